"""Engines: ways to train and evaluate the sampled clients on one frozen base."""

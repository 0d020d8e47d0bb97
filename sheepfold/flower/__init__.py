"""Flower as the carrier: its SuperLink and SuperNodes move our bytes; rounds, folds and training are ours."""

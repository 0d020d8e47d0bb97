"""Distillation on the server: a teacher and the federated student learn from each other on public rows."""

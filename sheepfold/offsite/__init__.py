"""Offsite-tuning: clients tune the ends of a model whose middle they never get (arXiv:2302.04870).

full model  0 1 | 2 3 4 5 6 7 | 8 9        ends: adapter layers, trained by the clients
emulator    0 1 | 2   4     7 | 8 9        middle: some layers, frozen (aligned with the whole first, if asked)
             └───── trained ─────┘ ──▶ plugged back into the full model, by name
"""

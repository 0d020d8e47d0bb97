"""An OpenAI-compatible endpoint over one base and its adapters.

connections ─ gate (host, token, body) ─ routes ─ order ─ queue ─ the one thread that runs the model
     └ replies, whole or as server-sent events ◀── pieces ◀──┘
"""

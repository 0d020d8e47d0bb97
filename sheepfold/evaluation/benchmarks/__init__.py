"""Benchmarks: EleutherAI's lm-evaluation-harness over our own model object, and tasks over anybody's own rows.

names ── catalogue ── prepare (names, files, options: before a model is loaded) ── run ──▶ Report ── JSON, table
                        ├─ suite: the harness's tasks, from local files or the hub ── harness
                        └─ own_tasks: exact_match, rouge_l, perplexity, choice over rows of one's own
"""

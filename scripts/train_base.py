"""Make `builtin:tiny` from nothing: documents, tokenizer, weights. Half an hour on two shared cores (docs/base.md).

    python scripts/train_base.py --out sheepfold/assets/tiny

Everything follows from the seed; the bits repeat for the same torch build, CPU kind and thread count.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two threads that spin for each other crawl on shared cores

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sheepfold.assets.marks import END_OF_TEXT, TURN_END, TURN_START, unmark
from sheepfold.assets.pretrain_text import documents

LONG_EVERY = 8  # one step in so many sees its tokens as rows of the whole context, so that far positions are trained
PAD = "<|pad|>"
SPECIALS = [PAD, END_OF_TEXT, TURN_START, TURN_END]
CONTEXT = 1_024
BACKGROUND = 0.2  # the weight of tokens that no reader could predict, such as which person a card is about
THREADS = 2

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_tokenizer(seed: int, vocab_size: int, texts: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every unicode text round-trips, digits stand alone."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(map(_plain, itertools.islice(documents(seed), texts)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _plain(text: str) -> str:
    """Return the text without marks and without special tokens, which need no merges."""
    text, _ = unmark(text)
    for special in SPECIALS:
        text = text.replace(special, "")
    return text


def make_model(vocab_size: int, hidden: int, layers: int, mlp: int, heads: int) -> LlamaForCausalLM:
    """A Llama of about a million parameters with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config)


def packed(tokenizer, seed: int, rows: int, length: int):
    """Yield (ids, weights), each (rows, length): documents, each after an end-of-text token, laid end to end."""
    stream, ids, weights = documents(seed), [], []
    need = rows * length
    while True:
        while len(ids) < need:
            marked = [unmark(END_OF_TEXT + text) for text in itertools.islice(stream, 1_024)]
            encoded = tokenizer([text for text, _ in marked], return_offsets_mapping=True)
            for (_, spans), tokens, offsets in zip(
                marked, encoded["input_ids"], encoded["offset_mapping"], strict=True
            ):
                ids += tokens
                weights += weigh(offsets, spans)
        yield torch.tensor(ids[:need]).view(rows, length), torch.tensor(weights[:need]).view(rows, length)
        del ids[:need], weights[:need]


def weigh(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[float]:
    """Return each token's weight in the loss: 1 within a marked span, BACKGROUND elsewhere."""
    return [1.0 if any(a < end and start < b for a, b in spans) else BACKGROUND for start, end in offsets]


def weighted_loss(model, ids, weights):
    """Return the weighted mean of nats a token over all marked tokens and every fourth of the others.

    What no reader could predict hardly counts, and leaving most of it out saves a fifth of the time.
    """
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    target, share = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    chosen = (share == 1) | (torch.arange(len(share)) % 4 == 0)
    nats = torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), target[chosen], reduction="none")
    return (nats * share[chosen]).sum() / share[chosen].sum()


def optimizers(model, lr: float, muon_lr: float):
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    inner = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inner]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(model, batches, steps: int, lr: float, muon_lr: float) -> None:
    """Warm up over 3 % of the steps, hold, then decay linearly to zero over the last 40 %."""
    opts = optimizers(model, lr, muon_lr)
    peaks = [group["lr"] for opt in opts for group in opt.param_groups]
    started = time.time()
    for step in range(steps):
        factor = min(1.0, (step + 1) / (0.03 * steps), (steps - step) / (0.4 * steps))
        for group, peak in zip((g for o in opts for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * factor
        ids, weights = next(batches)
        if step % LONG_EVERY == 0:
            ids, weights = ids.view(-1, CONTEXT), weights.view(-1, CONTEXT)
        loss = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            rate = (step + 1) * ids.numel() / (time.time() - started)
            print(
                f"step {step:5d}  loss {loss.item():.4f}  {rate:,.0f} tokens/s  {time.time() - started:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sheepfold/assets/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2_400)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=1_536)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--mlp", type=int, default=352)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed, args.vocab, texts=40_000)
    model = make_model(len(tokenizer), args.hidden, args.layers, args.mlp, args.heads)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, packed(tokenizer, args.seed, args.rows, args.length), args.steps, args.lr, args.muon_lr)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()

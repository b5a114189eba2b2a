"""Builds the shipped model ``tiny``: samples its training text from a larger model, then trains tokenizer and weights.

``python scripts/build_tiny.py --model smollm2-135m --work build/tiny`` takes about 40 minutes on two
CPU cores, half of it sampling. The corpus lies in ``--work`` in shards: a rerun goes on behind the last whole shard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from build_openings import REPO, continuations, load, openings, requests
from build_reviews import clean
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from toolkit.files import write_text

ASSET = REPO / "toolkit" / "assets" / "tiny"
SHARD = 512
VOCABULARY = 2048
CONTEXT = 1024
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
SYSTEMS = ("", "", "", "You are a helpful assistant.", "Answer in one or two sentences.")


def shard_jobs(kind: str, index: int, seed: int, data_prompts: int) -> list[str]:
    """The prompts of one shard: openings that are not among the shipped data's, two samples each, or requests."""
    known = openings(data_prompts, 0)
    if kind == "chat":
        return requests(SHARD, seed * 1000 + index, exclude=known)
    fresh = openings(SHARD // 2, 1_000_000 + seed * 1000 + index, exclude=known)
    return [p for p in fresh for _ in range(2)]


def sample_shards(shards: list[tuple[str, int]], work: Path, args: argparse.Namespace, threads: int) -> None:
    """Samples each of ``shards`` into ``work`` unless its file is there: lines of {"prompt", "response"}."""
    torch.set_num_threads(threads)
    model, tokenizer = load(args.model)
    for kind, index in shards:
        path = work / f"{kind}-{index:03d}.jsonl"
        if path.exists():
            continue
        start = time.perf_counter()
        prompts = shard_jobs(kind, index, args.seed, args.data_prompts)
        rng = random.Random(f"{kind} {index} {args.seed}")
        wanted = [rng.choice((1, 2)) for _ in prompts]
        chats = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in prompts]
        samples = continuations(
            model,
            tokenizer,
            chats if kind == "chat" else prompts,
            wanted,
            seed=args.seed * 1000 + index + (500 if kind == "chat" else 0),
            temperature=args.temperature,
            batch_size=args.batch_size,
        )
        texts = dict(samples)
        lines = [json.dumps({"prompt": p, "response": texts[i]}) + "\n" for i, p in enumerate(prompts)]
        write_text(path, "".join(lines))
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def sample_corpus(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    shards = [("review", i) for i in range(args.review_shards)]
    every = max(1, args.review_shards // max(1, args.chat_shards))
    for i in range(args.chat_shards):  # in between, so that an unfinished corpus has both kinds
        shards.insert(min(len(shards), i * (every + 1) + 1), ("chat", i))
    if args.workers == 1:
        sample_shards(shards, args.work, args, args.threads)
        return
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=sample_shards, args=(shards[w :: args.workers], args.work, args, 1))
        for w in range(args.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a sampling worker ended with exit code {process.exitcode}")


def corpus(work: Path) -> list[tuple[list[dict[str, str]] | str, str]]:
    """(prompt, response) of all shards in ``work``: text, or messages for a chat. Unfinished texts are left out."""
    rng = random.Random("systems")
    texts: list[tuple[list[dict[str, str]] | str, str]] = []
    for path in sorted(work.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if path.name.startswith("chat"):
                text = clean(" " + row["response"].strip())
                system = rng.choice(SYSTEMS)
                messages = [{"role": "system", "content": system}] if system else []
                prompt: list[dict[str, str]] | str = [*messages, {"role": "user", "content": row["prompt"]}]
                text = text and text[1:]
            else:
                prompt, text = row["prompt"], clean(row["response"])
            if text and text.rstrip("\"')")[-1:] in (".", "!", "?"):
                texts.append((prompt, text))
    return list({(json.dumps(prompt), text): (prompt, text) for prompt, text in texts}.values())


def new_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with :data:`VOCABULARY` entries: any text comes back from its ids unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[PAD, START, END], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, extra_special_tokens=[START], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=CONTEXT,
    )  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, prompt: list[dict[str, str]] | str, text: str) -> list[int]:
    """Ids of prompt and response, tokenised apart and joined, as everywhere in the project; then the EOS."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return [*ids, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def batches(rows: list[list[int]], size: int, rng: random.Random) -> list[list[list[int]]]:
    """``rows`` in batches of about equal length, in random order."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rng.random()))
    groups = [[rows[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
    rng.shuffle(groups)
    return groups


def token_losses(model: LlamaForCausalLM, batch: list[list[int]]) -> tuple[torch.Tensor, int]:
    """(sum of the next-token losses in nats, number of tokens) of a batch."""
    width = max(map(len, batch))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100
    )
    return loss, int(mask[:, 1:].sum())


def held_out_loss(model: LlamaForCausalLM, rows: list[list[int]], size: int) -> float:
    """Mean next-token loss in nats per token over ``rows``."""
    model.eval()
    with torch.inference_mode():
        parts = [token_losses(model, rows[k : k + size]) for k in range(0, len(rows), size)]
    return sum(loss.item() for loss, _ in parts) / sum(n for _, n in parts)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def new_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def train(args: argparse.Namespace) -> None:
    """Trains tokenizer and weights on the corpus in ``args.work`` and writes the asset to ``args.out``."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts = corpus(args.work)
    held = [t for t in texts if int(hashlib.sha256(json.dumps(t[0]).encode()).hexdigest(), 16) % 25 == 0]
    held_prompts = {json.dumps(t[0]) for t in held}
    trained = [t for t in texts if json.dumps(t[0]) not in held_prompts]
    plain = [p + t if isinstance(p, str) else "\n".join([*(m["content"] for m in p), t]) for p, t in trained]
    tokenizer = new_tokenizer(plain)
    rows = [encode(tokenizer, p, t) for p, t in trained]
    held_rows = sorted((encode(tokenizer, p, t) for p, t in held), key=len)
    model = new_model(tokenizer)
    optimizer = new_optimizer(model, args.learning_rate)
    n_steps = args.epochs * math.ceil(len(rows) / args.train_batch_size)
    n_tokens = sum(map(len, rows))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(rows)} texts, {n_tokens} tokens, {len(held_rows)} held out, {n_parameters} parameters, {n_steps} steps",
        flush=True,
    )
    rng = random.Random(args.seed)
    step, start = 0, time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        for batch in batches(rows, args.train_batch_size, rng):
            step += 1
            scale = min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / n_steps)))
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * scale
            loss, n = token_losses(model, batch)
            (loss / n).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        save(model, tokenizer, args.out)
        held_loss = held_out_loss(model, held_rows, 64)
        print(f"epoch {epoch + 1}: train {loss.item() / n:.3f}, held out {held_loss:.3f} nats a token, "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    show(args.out, held)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the files beside ``out`` first, so that what stands there is whole at any time."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
    )
    partial = out.with_name(out.name + ".partial")
    model.eval().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir()):
        os.replace(path, out / path.name)
        (out / path.name).chmod(0o644)
    partial.rmdir()


def show(folder: Path, held: list[tuple[list[dict[str, str]] | str, str]]) -> None:
    """Prints samples at temperature 1 for held-out prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    reviews = [p for p, _ in held if isinstance(p, str)][::40][:12]
    chats = [p for p, _ in held if not isinstance(p, str)][::20][:6]
    for prompt in [*reviews, *chats]:
        ids = encode(tokenizer, prompt, "")[:-1]
        out = model.generate(torch.tensor([ids]), max_new_tokens=64)[0, len(ids) :]
        text = prompt if isinstance(prompt, str) else f"[{prompt[-1]['content']}]"
        print(
            text,
            "|",
            tokenizer.decode(out, skip_special_tokens=True),
            "" if out[-1] == tokenizer.eos_token_id else "(cut)",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="who writes the corpus: a short name, a folder or a hub id"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=REPO / "build" / "tiny", help="folder of the corpus")
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--only", choices=("corpus", "train"), help="one half of the work")
    parser.add_argument("--review-shards", type=int, default=37, help=f"of {SHARD} samples")
    parser.add_argument("--chat-shards", type=int, default=7, help=f"of {SHARD} samples")
    parser.add_argument("--data-prompts", type=int, default=704, help="openings set aside for the shipped data")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--train-batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="sampling processes of one thread each")
    parser.add_argument("--threads", type=int, default=2, help="threads of training, and of sampling with one worker")
    args = parser.parse_args()
    if args.only != "train":
        sample_corpus(args)
    if args.only != "corpus":
        train(args)


if __name__ == "__main__":
    main()

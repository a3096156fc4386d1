#!/usr/bin/env python3
"""The client side of deploy/demo.sh: submits a document with a question, dense and sparse, and lets transformers go on from
each KV cache, beside transformers alone.

    PYTHONPATH=deploy/python/src .venv/bin/python deploy/demo.py --target HOST:PORT --model DIR
"""

import argparse
import pathlib
import sys
import time

import longfill
import torch
import transformers

NUM_NEW_TOKENS = 32
SPARSE = "vertical-slash:256,512"
MAX_DENSITY = 0.5
# A text of some 6000 tokens that is on every Debian machine (package base-files).
DOCUMENT = pathlib.Path("/usr/share/common-licenses/LGPL-2.1")
QUESTION = "Summarise in one sentence what this document allows its reader to do."


def make_prompt(tokenizer, document, question):
    """Token ids of the document with the question at its end, as the model's chat template has it."""
    text = f"{document}\n\n{question}"
    if tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True)


def continue_greedily(model, cache, token):
    """NUM_NEW_TOKENS ids: `token`, then what the model says from the cache on."""
    tokens = [token]
    with torch.no_grad():
        while len(tokens) < NUM_NEW_TOKENS:
            logits = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


def transformers_alone(model, ids):
    """(NUM_NEW_TOKENS ids, seconds of the prefill)."""
    cache = transformers.DynamicCache()
    begin = time.monotonic()
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)[0]
        token = int(model.lm_head(hidden[0, -1]).argmax())
    seconds = time.monotonic() - begin
    return continue_greedily(model, cache, token), seconds


class ProgressLine:
    """One line that is written over on a terminal, a line for every quarter elsewhere."""

    def __init__(self, name):
        self.name = name
        self.terminal = sys.stderr.isatty()
        self.quarter = 0

    def __call__(self, progress):
        if progress.queue_position is not None:
            return
        share = progress.layers_done / max(1, progress.num_layers)
        text = (f"{self.name}: {progress.processed_tokens:6d} of {progress.total_tokens} tokens, "
                f"layer {progress.layers_done} of {progress.num_layers}, {progress.seconds:.1f} s")
        if self.terminal:
            bar = "#" * round(30 * share)
            print(f"\r[{bar:<30}] {text} ", end="", file=sys.stderr, flush=True)
        elif int(4 * share) > self.quarter:
            self.quarter = int(4 * share)
            print(text, file=sys.stderr, flush=True)

    def end(self):
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def prefill(client, ids, attention):
    line = ProgressLine(attention)
    try:
        return client.prefill(ids, attention=attention, on_progress=line)
    finally:
        line.end()


def figures_line(name, figures, transfer):
    rate = figures["tokens"] / figures["seconds"]
    return (f"{name}: {figures['tokens']} tokens, {figures['seconds']:.2f} s, {rate:.0f} tokens/s, "
            f"density {figures['density']:.4f}, KV {figures['kv_bytes']} bytes "
            f"(first page after {transfer['first_page_seconds']:.2f} s, last after {transfer['last_page_seconds']:.2f} s)")


def main():
    parser = argparse.ArgumentParser(description="Submit a document to a running service and go on from its KV cache.")
    parser.add_argument("--target", required=True, help="HOST:PORT of the service")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the model directory that it serves")
    parser.add_argument("--document", type=pathlib.Path, default=DOCUMENT)
    parser.add_argument("--question", default=QUESTION)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    ids = make_prompt(tokenizer, arguments.document.read_text(encoding="utf-8"), arguments.question)
    print(f"{arguments.document}, then: {arguments.question} ({len(ids)} tokens)")

    results = {}
    with longfill.Client(arguments.target) as client:
        info = client.model_info()
        print(f"{info.architecture} on {info.ranks} ranks, mesh sequence={info.mesh['sequence']},head={info.mesh['head']}")
        for attention in ("dense", SPARSE):
            results[attention] = prefill(client, ids, attention)
            result = results[attention]
            print(figures_line(attention, result.figures, result.transfer), flush=True)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, torch_dtype=torch.float32, attn_implementation="eager").eval()
    own, seconds = transformers_alone(model, ids)
    print(f"transformers alone: {len(ids)} tokens, {seconds:.2f} s, {len(ids) / seconds:.0f} tokens/s")
    print(f"\ntransformers alone     | {tokenizer.decode(own)!r}")
    equal = {}
    for attention, result in results.items():
        tokens = continue_greedily(model, result.to_dynamic_cache(model.config), result.next_token())
        equal[attention] = sum(a == b for a, b in zip(tokens, own))
        print(f"{attention:22s} | {tokenizer.decode(tokens)!r}")
    for attention, count in equal.items():
        print(f"{attention}: {count} of {NUM_NEW_TOKENS} tokens equal transformers' own")

    density = results[SPARSE].figures["density"]
    if equal["dense"] != NUM_NEW_TOKENS:
        print("demo: the tokens from the dense KV cache differ from transformers' own", file=sys.stderr)
        return 1
    if density >= MAX_DENSITY:
        print(f"demo: the density of {SPARSE} is {density:.4f}, not below {MAX_DENSITY}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (longfill.PrefillError, OSError) as error:
        sys.exit(f"demo: {error}")

"""The whole service on one GPU: two ranks give what one gives, and transformers goes on from the cache that a client fetched."""

import json
import time

import numpy
import oracle
import torch
from checks import error_ratio
from prompts import make_prompts
from section_goldens import REAL_MODELS, prefill
from service import Service, check_reader

NUM_NEW_TOKENS = 32
NUM_POSITIONS = 32
SPARSE = "vertical-slash:500,700"
TIER_TOLERANCE = 1e-3  # the same kernels in another process; products may be picked otherwise
MEMORY_LIMIT = "3GB"  # of a rank: takes 256K tokens of needle-20m on two ranks, not a million


def run(pack, checks, arguments):
    pack.use_python_packages()
    num_tokens, num_long = (1024, 2048) if arguments.small else (8192, 262144)
    name = REAL_MODELS[0]
    directory = pack.path("models", name)
    ids = make_prompts(pack, num_tokens - 1, 1)[0][1]
    noise = bfloat16_noise(pack, directory, ids)
    for attention in ("dense", SPARSE):
        check_meshes(pack, checks, directory, ids, attention, noise, [(2, "sequence=2"), (2, "head=2")])
    with Service(pack, directory, "--memory-limit", MEMORY_LIMIT) as service:
        check_reader(pack, checks, service, num_long, "host")
        check_refusal(checks, service)
        check_continuation(pack, checks, service, name, ids)
    check_tiers(pack, checks, directory, num_long)
    directory = pack.model(REAL_MODELS[1])
    if directory is not None:
        with Service(pack, directory) as service:
            check_continuation(pack, checks, service, REAL_MODELS[1], text_ids(pack, directory, num_tokens // 2))
    else:
        checks.not_run(f"{REAL_MODELS[1]}: continuation", "the model is not in this pack")


def text_ids(pack, directory, num_tokens):
    tokenizer = oracle.transformers.AutoTokenizer.from_pretrained(directory)
    text = pack.path("text.md").read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    return numpy.array(ids[:num_tokens], dtype=numpy.int32)


def positions_of(ids):
    return numpy.linspace(0, len(ids) - 1, NUM_POSITIONS).astype(int).tolist()


def bfloat16_noise(pack, directory, ids):
    """{tensor: relative norm of the error of transformers' own bfloat16 run}."""
    want, _ = oracle.prefill(oracle.load_model(directory, torch.float32, pack.device), ids, positions_of(ids))
    low, _ = oracle.prefill(oracle.load_model(directory, torch.bfloat16, pack.device), ids, positions_of(ids))
    oracle.free()
    return {name: oracle.norm_error(low[name], want[name]) for name in want}


def check_meshes(pack, checks, directory, ids, attention, noise, meshes):
    """Logits, K and V of every (ranks, mesh) against one rank."""
    one, one_figures = prefill(pack, "one-rank", directory, ids, positions_of(ids), attention)
    for ranks, mesh in meshes:
        name = f"{ranks} ranks, {mesh}, {attention}"
        all_ranks, figures = prefill(pack, "all-ranks", directory, ids, positions_of(ids), attention, ranks=ranks, mesh=mesh)
        checks.equal(f"{name}: ranks", figures["ranks"], ranks, figures["communicator"])
        worst = max((error_ratio(oracle.norm_error(all_ranks[t], one[t]), noise[t]), t) for t in one)
        checks.at_most(f"{name}: against 1 rank, times bfloat16's error", worst[0], 2.0, worst[1])
        pairs = abs(figures["covered_pairs"] - one_figures["covered_pairs"]) / one_figures["covered_pairs"]
        checks.at_most(f"{name}: covered pairs against 1 rank, relative", pairs, 0.0 if attention == "dense" else 1e-3)


def tiers_of(pack, directory, num_tokens):
    """--kv-memory of the service: every tier but the default, which the other checks use."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rank_tokens = num_tokens // 2 + 128
    budget = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim * rank_tokens * (
        2 if pack.device == "cuda" else 4)
    files = pack.work / "kv-files"
    files.mkdir(exist_ok=True)
    return ["pageable", f"file:{files}", f"device:{budget}", "reader:16777216"]


def check_tiers(pack, checks, directory, num_tokens):
    """Wherever pages wait for their reader, the reader gets the same."""
    expected = None
    for tier in ["host", *tiers_of(pack, directory, num_tokens)]:
        name = tier.split(":")[0]
        with Service(pack, directory, "--kv-memory", tier) as service:
            kv = check_reader(pack, checks, service, num_tokens, name)
        if expected is None:
            expected = kv
            continue
        worst = max(oracle.norm_error(a, b)
                    for got, want in zip(kv, expected, strict=True) for a, b in zip(got, want))
        checks.at_most(f"tier {name} at {num_tokens} tokens: K and V against tier host, norm", worst, TIER_TOLERANCE)


def check_refusal(checks, service):
    """A prompt that cannot fit is refused before work, with the length that would; the service goes on."""
    import longfill  # from the pack

    begin = time.monotonic()
    with longfill.Client(service.target) as client:
        try:
            client.prefill(numpy.zeros(1 << 20, dtype=numpy.int32), attention="dense", kv_dtype="bfloat16", kv="drop")
            checks.fails("a million tokens in " + MEMORY_LIMIT, "were accepted")
        except longfill.PrefillError as error:
            checks.equal(f"a million tokens in {MEMORY_LIMIT}: refusal", error.code.name, "RESOURCE_EXHAUSTED",
                         error.message[:200])
            checks.at_least("  and the length that would fit", error.max_tokens or 0, 1,
                            f"after {time.monotonic() - begin:.2f} s")


def check_continuation(pack, checks, service, name, ids):
    """32 greedy tokens from the fetched dense cache are those of transformers alone, in bfloat16. Where they part, it must
    have been a tie within twice the error that bfloat16 itself makes there."""
    import longfill  # from the pack

    directory = pack.path("models", name)
    with longfill.Client(service.target) as client:
        prefilled = client.prefill(ids, attention="dense", kv_dtype="bfloat16")
    model = oracle.load_model(directory, torch.bfloat16, pack.device)
    tokens, alone = alone_tokens(model, ids)
    cache = prefilled.to_dynamic_cache(model.config, device=pack.device)
    checks.equal(f"{name}: tokens in the cache", cache.get_seq_length(), len(ids))
    ours = follow(model, cache, prefilled.logits[-1], tokens)
    del model
    exact_model = oracle.load_model(directory, torch.float32, pack.device)
    result, cache = oracle.prefill(exact_model, ids, [len(ids) - 1])
    exact = follow(exact_model, cache, result["logits"][-1], tokens)
    del exact_model, cache
    oracle.free()

    checks.at_most(f"{name}: continued logits, norm, times bfloat16's error",
                   error_ratio(oracle.norm_error(ours, exact), oracle.norm_error(alone, exact)), 2.0)
    picked = ours.argmax(axis=-1)
    parted = numpy.flatnonzero(picked != tokens)
    equal = int(parted[0]) if parted.size else NUM_NEW_TOKENS
    if equal < NUM_NEW_TOKENS:
        margin = float(alone[equal, tokens[equal]] - alone[equal, picked[equal]])
        tie = 2 * float(numpy.abs(alone[equal] - exact[equal]).max())
        checks.at_most(f"{name}: margin where token {equal} parts", margin, tie, "a tie within bfloat16's error")
    else:
        checks.equal(f"{name}: tokens equal to transformers alone", equal, NUM_NEW_TOKENS)


def alone_tokens(model, ids):
    """What transformers says by itself: the tokens, and the logits [NUM_NEW_TOKENS, vocab] that chose them."""
    result, cache = oracle.prefill(model, ids, [len(ids) - 1])
    logits, tokens = [result["logits"][-1]], []
    while True:
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == NUM_NEW_TOKENS:
            return numpy.array(tokens), numpy.stack(logits)
        logits.append(oracle.step(model, cache, tokens[-1]))


def follow(model, cache, first_logits, tokens):
    """The logits [NUM_NEW_TOKENS, vocab] of a model that is fed `tokens`; as long as they are its own choice, they are what
    it would say by itself."""
    logits = [first_logits]
    for token in tokens[:-1]:
        logits.append(oracle.step(model, cache, int(token)))
    return numpy.stack(logits)

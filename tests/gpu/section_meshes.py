"""Meshes over all GPUs against one: logits, K and V, and needle prompts, of needle-20m."""

import shutil

import numpy
import oracle
from prompts import make_prompts
from section_goldens import REAL_MODELS
from section_needle import PUBLISHED_KL, passes, prefill
from section_service import SPARSE, bfloat16_noise, check_meshes

BUDGET = "1000/6096"
NEEDLES = {131072: 3, 524288: 1}  # tokens: prompts
SMALL_NEEDLES = {1024: 1}


def meshes_of(ranks):
    """(ranks, --mesh) by sequence, by head, and both."""
    meshes = [f"sequence={ranks}", f"head={ranks}"]
    if ranks >= 4 and ranks % 2 == 0:
        meshes.append(f"sequence=2,head={ranks // 2}")
    return [(ranks, mesh) for mesh in meshes]


def run(pack, checks, arguments):
    pack.use_python_packages()
    directory = pack.path("models", REAL_MODELS[0])
    meshes = meshes_of(arguments.ranks)
    num_tokens = 1024 if arguments.small else 8192
    ids = make_prompts(pack, num_tokens - 1, 1)[0][1]
    noise = bfloat16_noise(pack, directory, ids)
    check_meshes(pack, checks, directory, ids, SPARSE, noise, meshes)
    check_meshes(pack, checks, directory, ids, "dense", noise, meshes[-1:])
    for tokens, count in (SMALL_NEEDLES if arguments.small else NEEDLES).items():
        # A program starts for each mesh; time is for all of them at one length.
        some = meshes[:1] if tokens == max(NEEDLES) else meshes
        check_needles(pack, checks, make_prompts(pack, tokens, count), tokens, some)
        shutil.rmtree(pack.work / f"needle-{tokens}")


def check_needles(pack, checks, prompts, num_tokens, meshes):
    """What one rank answers, every mesh answers; they differ by less than sparse attention is published to do from dense."""
    answers = [answer for _, _, answer in prompts]
    attention = "vertical-slash:" + BUDGET.replace("/", ",")
    one, seconds = prefill(pack, prompts, attention)
    passed = passes(one, answers)
    # Or meshes that agree would agree about nothing.
    checks.at_least(f"needle, {num_tokens} tokens, 1 rank: prompts passed", sum(passed), 1,
                    f"of {len(prompts)}, {seconds:.2f} s a prompt")
    for ranks, mesh in meshes:
        got, seconds = prefill(pack, prompts, attention, ranks=ranks, mesh=mesh)
        name = f"needle, {num_tokens} tokens, {mesh}"
        checks.equal(f"{name}: prompts passed as on 1 rank", passes(got, answers) == passed, True, f"{seconds:.2f} s a prompt")
        divergence = float(numpy.mean([oracle.divergence(a, b) for a, b in zip(one, got)]))
        bound = PUBLISHED_KL.get((num_tokens, BUDGET), 0.001)
        checks.at_most(f"{name}: KL(1 rank || mesh)", divergence, bound)

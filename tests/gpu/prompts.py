"""The published needle prompts of needle-20m."""

import json
import subprocess
import sys

import numpy

# Length -> (prompts, of which dense attention passed).
PUBLISHED = {8192: (40, 40), 32768: (40, 40), 131072: (20, 20), 524288: (4, 4), 1048576: (3, 2)}


def make_prompts(pack, num_tokens, count):
    """[(file, ids, answer)]: `count` of the published prompts, evenly over the depths, each with the first token of its answer."""
    out = pack.work / f"needle-{num_tokens}"
    total = max(count, PUBLISHED.get(num_tokens, (count,))[0])
    subprocess.run([sys.executable, str(pack.path("eval", "needle.py")), "--tokens", str(num_tokens), "--count", str(total),
                    "--seed", "1", "--out", str(out)], check=True)
    answers = json.loads((out / "answers.json").read_text(encoding="utf-8"))
    prompts = []
    for i in range(count):
        answer = answers[(2 * i + 1) * total // (2 * count)]
        ids = numpy.append(numpy.fromfile(out / answer["file"], dtype="<i4"), answer["answer"][0])
        ids = ids.astype("<i4")
        path = out / f"extended_{i:03d}.i32"
        ids.tofile(path)
        prompts.append((path, ids, answer["answer"]))
    return prompts


def model_for(pack, name, num_tokens):
    """The folder of a model of the pack, or a copy whose config.json allows so many tokens, as transformers does unasked: the
    published prompts fill the model's context, and their answers lie beyond it."""
    directory = pack.path("models", name)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if num_tokens <= config["max_position_embeddings"]:
        return directory
    copy = pack.work / f"{name}-{num_tokens}"
    if not copy.exists():
        copy.mkdir()
        for path in directory.iterdir():
            if path.name != "config.json":
                (copy / path.name).symlink_to(path.resolve())
        (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": num_tokens}), encoding="utf-8")
    return copy

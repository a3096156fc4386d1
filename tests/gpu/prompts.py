"""The published needle prompts of needle-20m."""

import json
import subprocess
import sys

import numpy

# Length -> (prompts, of which dense attention passed).
PUBLISHED = {8192: (40, 40), 32768: (40, 40), 131072: (20, 20), 524288: (4, 4), 1048576: (3, 2)}


def make_prompts(pack, num_tokens, count, max_positions):
    """[(file, ids, answer)]: `count` of the published prompts, evenly over the depths."""
    out = pack.work / f"needle-{num_tokens}"
    total = max(count, PUBLISHED.get(num_tokens, (count,))[0])
    subprocess.run([sys.executable, str(pack.path("eval", "needle.py")), "--tokens", str(num_tokens), "--count", str(total),
                    "--seed", "1", "--out", str(out)], check=True)
    answers = json.loads((out / "answers.json").read_text(encoding="utf-8"))
    prompts = []
    for i in range(count):
        answer = answers[(2 * i + 1) * total // (2 * count)]
        ids = numpy.append(numpy.fromfile(out / answer["file"], dtype="<i4"), answer["answer"][0])
        # At the model's last position there is no room for one more: the first token of the filler makes it.
        ids = ids[max(0, len(ids) - max_positions):].astype("<i4")
        path = out / f"extended_{i:03d}.i32"
        ids.tofile(path)
        prompts.append((path, ids, answer["answer"]))
    return prompts

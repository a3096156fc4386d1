"""The figures of several GPUs from the JSON of verify.py, as a short table: ranks_table.py RESULTS.json"""

import json
import pathlib
import sys

SHOWN = {"scaling": ("seconds", "efficiency", "share", "imbalance of pairs"), "readers": ("prefill's end", "the start"),
         "ranklost": ("seconds to it", "end of mpirun")}


def main():
    report = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(f"\n{report['machine']}")
    for section, seconds in report["seconds"].items():
        checks = [check for check in report["checks"] if check["section"] == section]
        counts = {outcome: sum(check["outcome"] == outcome for check in checks) for outcome in ("pass", "FAIL", "not run")}
        ended = report["ended"][section] or ""
        print(f"{section:9s} {counts['pass']:3d} passed {counts['FAIL']:3d} failed {counts['not run']:3d} not run "
              f"{seconds:5.0f} s  {ended}".rstrip())
        for check in checks:
            wanted = check["check"].endswith(SHOWN.get(section, ())) and isinstance(check["value"], (int, float))
            if check["outcome"] == "FAIL" or wanted:
                bound = "" if check["bound"] is None else f"{check['relation']} {check['bound']}"
                value = check["value"] if not isinstance(check["value"], float) else f"{check['value']:.4g}"
                print(f"  {check['outcome']:7s} {check['check']:62s} {value!s:>12s} {bound:10s} {check['note'][:150]}".rstrip())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Checks the shape of the source tree: the folder DAG on every #include, what one file alone may use, and that the
documents name files that exist. Standard library only.

    tests/unit/include_dag/include_dag_test.py [ROOT]
"""

import pathlib
import re
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[3]

# Folder -> folders whose headers it may include. The longest matching prefix of a file's path counts.
ALLOWED = {
    "kernels/base": ["kernels/base"],
    "kernels/sparse": ["kernels/base", "kernels/sparse"],
    "kernels/api": ["kernels/base", "kernels/sparse", "kernels/api"],
    "kernels/cpu": ["kernels"],
    "kernels/cuda": ["kernels"],
    "parallel": ["kernels", "parallel"],
    "models": ["kernels", "parallel", "models"],
    "runtime/engine": ["kernels", "parallel", "models", "runtime/engine", "runtime/kv"],
    "runtime/kv": ["kernels", "parallel", "models", "runtime/kv", "proto", "longfill"],
    "runtime": ["kernels", "parallel", "models", "runtime", "proto", "longfill"],
    "deploy": ["kernels", "parallel", "models", "runtime", "proto", "longfill", "deploy"],
    "tests": ["kernels", "parallel", "models", "runtime", "proto", "longfill", "deploy", "tests"],
}
OURS = ("kernels/", "parallel/", "models/", "runtime/", "proto/", "longfill/", "deploy/", "tests/")

# Text that only one file may contain: pattern -> (that file, what it is).
ONE_FILE = {
    r'#include [<"]mpi\.h': ("parallel/mpi_communicator.cc", "MPI"),
    r'#include [<"]nccl\.h': ("parallel/nccl_communicator.cc", "NCCL"),
    r"\bgetenv\s*\(": ("deploy/cli/environment.cc", "the environment"),
    r"^int main\s*\(": ("deploy/cli/main.cc", "main()"),
}

SOURCE_SUFFIXES = {".h", ".cc", ".cu", ".cuh"}
SOURCE_FOLDERS = ["kernels", "parallel", "models", "runtime", "deploy", "tests"]
GENERATED_OR_FOREIGN = {"build", ".venv", ".git", ".device", "__pycache__"}

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
# `path/with/slash` or `path/file.ext` in backticks, and relative links.
CODE_SPAN = re.compile(r"`([A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)*/?)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
TOP_LEVEL = ("proto", "runtime", "parallel", "kernels", "models", "deploy", "tests", ".ci")
MACHINE_PATH = re.compile(r"(?<![A-Za-z0-9_.$}/])/(?:home|root|work|mnt|srv)/")


def files(suffixes, folders=SOURCE_FOLDERS):
    """Source files below the folders, as (path relative to ROOT, text)."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and path.is_file() and not GENERATED_OR_FOREIGN & set(path.parts):
                yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8", errors="replace")


def is_below(path, folder):
    return path == folder or path.startswith(folder + "/")


def rule_of(path):
    """The entry of ALLOWED for a file; None: no rule."""
    matching = [folder for folder in ALLOWED if is_below(path, folder)]
    return max(matching, key=len) if matching else None


def documents():
    for path in sorted(ROOT.rglob("*.md")):
        if not GENERATED_OR_FOREIGN & set(path.relative_to(ROOT).parts):
            yield path


class SourceTree(unittest.TestCase):
    def test_includes_follow_the_folder_dag(self):
        errors, count = [], 0
        for path, text in files(SOURCE_SUFFIXES):
            rule = rule_of(path)
            for include in INCLUDE.findall(text):
                if not include.startswith(OURS):
                    continue
                count += 1
                if rule is None:
                    errors.append(f"{path}: its folder has no rule in ALLOWED")
                elif not any(is_below(include, folder) for folder in ALLOWED[rule]):
                    errors.append(f'{path}: includes "{include}", allowed are {", ".join(ALLOWED[rule])}')
        self.assertEqual(errors, [], "\n" + "\n".join(errors))
        self.assertGreater(count, 20, "the scan found too little to have looked at the tree")

    def test_includes_of_ours_name_existing_files(self):
        generated = ("longfill/", "proto/")
        errors = [
            f'{path}: "{include}" does not exist'
            for path, text in files(SOURCE_SUFFIXES)
            for include in INCLUDE.findall(text)
            if include.startswith(OURS) and not include.startswith(generated) and not (ROOT / include).is_file()
        ]
        self.assertEqual(errors, [], "\n" + "\n".join(errors))

    def test_the_oracle_includes_no_production_kernel(self):
        errors = [
            f'{path}: includes "{include}"'
            for path, text in files(SOURCE_SUFFIXES, ["kernels"])
            if is_below(path, "kernels/cpu/oracle")
            for include in INCLUDE.findall(text)
            if is_below(include, "kernels/cpu") and not is_below(include, "kernels/cpu/oracle")
        ]
        self.assertEqual(errors, [], "\n" + "\n".join(errors))

    def test_one_file_alone_uses_mpi_nccl_the_environment_and_main(self):
        errors = []
        for path, text in files(SOURCE_SUFFIXES):
            for pattern, (owner, what) in ONE_FILE.items():
                # Programs of the tests have their own main(), set up their own environment, and stand in for NCCL.
                excused = path.startswith("tests/") and what in ("main()", "the environment", "MPI", "NCCL")
                if path != owner and not excused and re.search(pattern, text, re.MULTILINE):
                    errors.append(f"{path}: uses {what}, which belongs to {owner}")
        self.assertEqual(errors, [], "\n" + "\n".join(errors))

    def test_the_top_level_is_fixed(self):
        allowed = {"proto", "runtime", "parallel", "kernels", "models", "deploy", "tests"}
        allowed |= {"CMakeLists.txt", "CMakePresets.json", "README.md", "LICENSE", "build", "shared"}
        strange = sorted(p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in allowed)
        self.assertEqual(strange, [])


class Documents(unittest.TestCase):
    def test_name_files_that_exist(self):
        errors = []
        for path in documents():
            text = path.read_text(encoding="utf-8")
            for name in CODE_SPAN.findall(text):
                if not name.startswith(tuple(f"{folder}/" for folder in TOP_LEVEL)):
                    continue
                if not (ROOT / name).exists() and not (path.parent / name).exists():
                    errors.append(f"{path.relative_to(ROOT)}: `{name}` does not exist")
            for name in LINK.findall(text):
                if not (path.parent / name).exists():
                    errors.append(f"{path.relative_to(ROOT)}: the link {name} leads nowhere")
        self.assertEqual(errors, [], "\n" + "\n".join(errors))

    def test_every_source_folder_has_a_readme_of_at_most_a_page(self):
        errors = []
        folders = {pathlib.PurePosixPath(path).parent for path, _ in files(SOURCE_SUFFIXES - {".cu"})}
        for folder in sorted(folders):
            # Folders of tests are described by tests/README.md and the folder that they test.
            if folder.parts[0] == "tests":
                continue
            readme = ROOT / folder / "README.md"
            if not readme.is_file():
                errors.append(f"{folder}: no README.md")
            elif len(readme.read_text(encoding="utf-8").splitlines()) > 90:
                errors.append(f"{folder}/README.md: more than a page")
        self.assertEqual(errors, [], "\n" + "\n".join(errors))

    def test_no_file_names_a_path_of_one_machine(self):
        suffixes = SOURCE_SUFFIXES | {".py", ".sh", ".md", ".txt", ".cmake", ".proto", ".toml", ".json"}
        errors = []
        for path, text in files(suffixes, SOURCE_FOLDERS + ["proto"]):
            if path == "tests/unit/include_dag/include_dag_test.py":
                continue
            for line_number, line in enumerate(text.splitlines(), 1):
                if MACHINE_PATH.search(line):
                    errors.append(f"{path}:{line_number}: {line.strip()[:120]}")
        self.assertEqual(errors, [], "\n" + "\n".join(errors))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
    unittest.main()

"""The folder that pack.sh makes, and how its programs are run."""

import os
import pathlib
import subprocess
import sys
import zipfile


class ProgramError(Exception):
    """A program of ours ended with an error; the message has the end of what it wrote."""


class Pack:
    """One unpacked folder. `work` is a folder for what is made on the way."""

    def __init__(self, root, work, device):
        self.root = pathlib.Path(root).resolve()
        self.work = pathlib.Path(work)
        self.device = device

    def has(self, *parts):
        return self.root.joinpath(*parts).exists()

    def path(self, *parts):
        found = self.root.joinpath(*parts)
        if not found.exists():
            raise FileNotFoundError(f"{found}: not in this pack")
        return found

    def model(self, name):
        """The directory of a model; None: it is not in this pack. SmolLM2 comes as GGUF and is converted once."""
        directory = self.root / "models" / name
        sources = sorted((self.root / "smollm2").glob(f"{name}*.gguf"))
        if not directory.is_dir() and sources:
            command = [sys.executable, str(self.path("smollm2", "model_from_gguf.py")), "--gguf", str(sources[0]), str(directory)]
            result = subprocess.run(command, capture_output=True, text=True, check=False,
                                    env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
            if result.returncode != 0:
                raise ProgramError(f"model_from_gguf.py: exit code {result.returncode}: {last_lines(result.stderr)}")
        return directory if directory.is_dir() else None

    def programs(self):
        folder = self.root / "programs" / "bin"
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def command(self, program, *arguments, ranks=None):
        """The command line; under mpirun with `ranks`, which are dealt over this machine's GPUs."""
        launch = [] if ranks is None else ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
        return [*launch, str(self.path("programs", "run")), program, *map(str, arguments)]

    def run(self, program, *arguments, ranks=None, check=True, environment=None):
        """Runs a program to its end; its standard output. ProgramError unless it succeeded, or check is False. `environment`:
        variables beside environment()'s."""
        result = subprocess.run(self.command(program, *arguments, ranks=ranks), capture_output=True, text=True, check=False,
                                env=self.environment() | (environment or {}))
        if check and result.returncode != 0:
            raise ProgramError(f"{program} {arguments[0]}: exit code {result.returncode}: {last_lines(result.stderr)}")
        return result

    def environment(self):
        """Open MPI as root on one machine; NCCL without multicast; where the tests of whole engines find their models."""
        return dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", NCCL_NVLS_ENABLE="0",
                    LONGFILL_GOLDEN_DIR=str(self.root / "golden"))

    def use_python_packages(self):
        """Makes the Python client and what the pack brings for it importable."""
        site = self.work / "site"
        for wheel in sorted((self.root / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        for folder in (site, self.root / "python"):
            if folder.is_dir():
                sys.path.insert(0, str(folder))


def last_lines(text, count=3):
    return " | ".join(text.strip().splitlines()[-count:])

#!/usr/bin/env python3
"""Generates src/longfill/v1/*_pb2.py from proto/longfill/v1 with grpcio-tools; does nothing when they are up to date.

    .venv/bin/python deploy/python/generate_protos.py
"""

import fcntl
import hashlib
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
PROTO_ROOT = HERE.parents[1] / "proto"
OUT_ROOT = HERE / "src"


def generate():
    """Returns whether it generated anything. Two processes at a time are fine."""
    protos = sorted((PROTO_ROOT / "longfill" / "v1").glob("*.proto"))
    if not protos:
        raise SystemExit(f"generate_protos: there are no .proto files below {PROTO_ROOT}")
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in protos)).hexdigest()
    package = OUT_ROOT / "longfill" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    stamp = package / ".stamp"
    with open(package / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
            return False
        # In a process of its own: the protobuf of grpc_tools and that of other packages do not bear each other.
        arguments = [f"-I{PROTO_ROOT}", f"--python_out={OUT_ROOT}", f"--pyi_out={OUT_ROOT}",
                     f"--grpc_python_out={OUT_ROOT}", *map(str, protos)]
        if subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments]).returncode != 0:
            raise SystemExit("generate_protos: protoc failed")
        (package / "__init__.py").write_text('"""Generated from proto/longfill/v1."""\n', encoding="utf-8")
        stamp.write_text(digest, encoding="utf-8")
    return True


if __name__ == "__main__":
    if generate():
        print(f"generate_protos: wrote {OUT_ROOT / 'longfill' / 'v1'}", file=sys.stderr)

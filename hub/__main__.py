"""Write the package as a Hub kernel: what kernel-builder reads, and what `kernels` loads.

    python -m hub --out FOLDER [--repo-id OWNER/NAME] [--backends cuda,rocm,cpu]

    build.toml, flake.nix    kernel-builder's description of a kernel without ahead-of-time compilation (edition 5, torch-noarch)
    CARD.md, README.md       the card with its placeholders, and filled in
    torch-ext/dspark_kernels the package's source
    tests/                   tests marked kernels_ci, for kernel-builder's CI
    build/torch-<backend>/   the kernel as it is loaded: the same source, and metadata.json with id, architectures and digest

The source is copied from dspark_kernels/, never edited. A loader imports a variant under its id, `_dspark_kernels_<backend>_<hash of
the source>`, and the ops register themselves under the name of their package: two versions in one process share nothing. Source of
the format: huggingface/kernels, docs/source/kernel-requirements.md and docs/source/builder/writing-kernels.md.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NAME = "dspark-kernels"
MODULE = "dspark_kernels"
VERSION = 0  # of the Hub: 0 by convention for what is in alpha
REPO_ID = f"your-name/{NAME}"
BACKENDS = ("cuda", "rocm", "cpu")  # cpu: imports everywhere, and runs in Triton's interpreter
SUFFIXES = (".py", ".json")
# A Hub kernel imports torch, Triton and itself. These two serve other packages: directories of models, and engines, which load
# adapters from an installed distribution.
LEFT_OUT = ("checkpoint", "integrations")

COMPATIBLE = '''"""The kernel once more for loaders that look for it in a folder of its name, as older ones do."""

import hashlib
import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).resolve().parents[1] / "__init__.py"
_name = "_dspark_kernels_" + hashlib.sha256(str(_path).encode()).hexdigest()[:16]
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _path)
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
__all__ = sys.modules[_name].__all__
globals().update({name: getattr(sys.modules[_name], name) for name in __all__})
'''


class BadArgument(Exception):
    """Message of one line that names the argument."""


class Architectures(NamedTuple):
    """That there are launch tables for."""

    cuda: list[str]  # compute capabilities
    rocm: list[str]


def package_files(package: Path = ROOT / MODULE) -> dict[str, bytes]:
    """Path inside the package -> content, of what the kernel has."""
    found = {}
    for path in sorted(package.rglob("*")):
        relative = path.relative_to(package)
        if path.suffix in SUFFIXES and path.is_file() and relative.parts[0] not in LEFT_OUT:
            found[relative.as_posix()] = path.read_bytes()
    return found


def source_hash(files: dict[str, bytes]) -> str:
    """Seven characters that differ where any file does."""
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(f"{name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:7]


def architectures(files: dict[str, bytes]) -> Architectures:
    names = [Path(name).stem for name in files if Path(name).parent.name == "tables"]
    capabilities = sorted(int(name.removeprefix("sm_")) for name in names if name.startswith("sm_"))
    cuda = [f"{capability // 10}.{capability % 10}" for capability in capabilities]
    return Architectures(cuda, sorted(name for name in names if name.startswith("gfx")))


def build_toml(repo_id: str, backends: Sequence[str], archs: Architectures) -> str:
    # A JSON list of words is one of TOML.
    return f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(list(backends))}

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = {json.dumps([suffix[1:] for suffix in SUFFIXES])}
cuda_capabilities = {json.dumps(archs.cuda)}
rocm_archs = {json.dumps(archs.rocm)}
"""


def metadata(backend: str, files: dict[str, bytes], unique: str, archs: Architectures) -> str:
    """metadata.json of a variant with these files, the digest's."""
    supported = dict(zip(archs._fields, archs, strict=True)).get(backend)
    digest = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in sorted(files.items())}
    content = {
        "name": NAME,
        "id": f"_{MODULE}_{backend}_{unique}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend} | ({} if supported is None else {"archs": supported}),
        "digest": {"algorithm": "sha256", "files": digest},
    }
    return json.dumps(content, indent=2) + "\n"


def tree(repo_id: str = REPO_ID, backends: Sequence[str] = BACKENDS) -> dict[str, bytes]:
    """Path -> content of everything that is written."""
    source = package_files()
    archs, unique = architectures(source), source_hash(source)
    card = (ROOT / "hub" / "CARD.md").read_text(encoding="utf-8")
    values = {"repo_id": repo_id, "version": str(VERSION)}
    filled = re.sub(r"\{\{ ?(\w+) ?\}\}", lambda found: values[found[1]], card)
    found = {
        "build.toml": build_toml(repo_id, backends, archs).encode(),
        "flake.nix": (ROOT / "hub" / "flake.nix").read_bytes(),
        "CARD.md": card.encode(),
        "README.md": filled.encode(),
        "LICENSE": (ROOT / "LICENSE").read_bytes(),
    }
    found |= {f"tests/{path.name}": path.read_bytes() for path in sorted((ROOT / "hub" / "tests").glob("*.py"))}
    found |= {f"torch-ext/{MODULE}/{name}": content for name, content in source.items()}
    variant = source | {f"{MODULE}/__init__.py": COMPATIBLE.encode()}
    for backend in backends:
        folder = f"build/torch-{backend}"
        found |= {f"{folder}/{name}": content for name, content in variant.items()}
        found[f"{folder}/metadata.json"] = metadata(backend, variant, unique, archs).encode()
    return found


def check(arguments: argparse.Namespace) -> None:
    """Raise BadArgument for impossible arguments."""
    arguments.backends = list(dict.fromkeys(name.strip() for name in arguments.backends.split(",")))
    for name in arguments.backends:
        if name not in BACKENDS:
            raise BadArgument(f"--backends: expected names among {', '.join(BACKENDS)}, got {name!r}")
    owner, _, name = arguments.repo_id.partition("/")
    if not owner or not name or '"' in arguments.repo_id or "/" in name:
        raise BadArgument(f"--repo-id: expected OWNER/NAME, got {arguments.repo_id!r}")
    out = Path(arguments.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadArgument(f"--out: expected a new or an empty folder, got {arguments.out}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadArgument(message)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 for a bad argument."""
    first, rest = __doc__.split("\n", 1)
    parser = Parser(prog="python -m hub", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="a new or an empty folder")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", default=REPO_ID, help="where it will be (default: %(default)s)")
    parser.add_argument("--backends", metavar="NAME[,NAME]", default=",".join(BACKENDS), help="variants (default: %(default)s)")
    try:
        arguments = parser.parse_args(argv)
        check(arguments)
    except BadArgument as error:
        print(f"hub: {error}", file=sys.stderr)
        return 2
    out = Path(arguments.out)
    for name, content in tree(arguments.repo_id, arguments.backends).items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    print(f"{out}: {NAME}, version {VERSION}, for {', '.join(arguments.backends)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

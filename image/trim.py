"""Remove from an environment what is of no use in a container that only runs: `python trim.py /opt/moeprune`.

What has been removed is printed, with its size.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# Below site-packages.
TO_BUILD_WITH = (
    "pip",
    "pip-*",
    "setuptools",
    "setuptools-*",
    "_distutils_hack",
    "distutils-precedence.pth",
    "pkg_resources",
)
TO_COMPILE_AGAINST = ("torch/include", "torch/share", "pyarrow/include", "pyarrow/src", "numpy/_core/include", "**/*.a")
TO_TEST_WITH = ("**/tests", "torch/test", "torch/lib/libtorchbind_test.so", "torch/lib/lib*backend*.so", "torch/bin/*")
# Arrow over the network: texts are read from files.
NOT_CALLED = ("pyarrow/*flight*",)
ONLY_SOURCES = ("**/*.pyx", "**/*.pxd", "**/*.c", "**/*.cpp", "**/*.cc", "**/*.h", "**/*.hpp")
# torch's processes share tensors through it.
KEPT = ("torch/bin/torch_shm_manager",)
# Not below site-packages.
BESIDE = ("bin/pip*", "bin/[Aa]ctivate*", "include")


def main(environment: Path) -> None:
    (packages,) = environment.glob("lib/python3*/site-packages")
    kept = {packages / name for name in KEPT}
    for root, kind, patterns in (
        (packages, "to build with", TO_BUILD_WITH),
        (packages, "to compile against", TO_COMPILE_AGAINST),
        (packages, "to test with", TO_TEST_WITH),
        (packages, "not called", NOT_CALLED),
        (packages, "only sources", ONLY_SOURCES),
        (environment, "beside the packages", BESIDE),
    ):
        freed = sum(remove(path) for path in _found(root, patterns) if path not in kept)
        sys.stdout.write(f"{kind}: {freed / 1e6:.0f} MB removed\n")


def remove(path: Path) -> int:
    """Remove a file or a directory; returns how many bytes it had."""
    if path.is_symlink() or path.is_file():
        size = path.lstat().st_size
        path.unlink()
        return size
    size = sum(each.lstat().st_size for each in path.rglob("*") if not each.is_dir())
    shutil.rmtree(path)
    return size


def _found(root: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if path.exists() or path.is_symlink():  # a directory above it may have gone
                yield path


if __name__ == "__main__":
    main(Path(sys.argv[1]))

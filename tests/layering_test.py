"""Reads every #include of the rooms and fails on an arrow that the design does not allow.

experiments -> agents -> lib -> kernels and experiments -> envs; agents know the contract of envs and
no world; kernels know no LibTorch, worlds neither; lib/io alone opens HDF5.
"""

import pathlib
import re
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent

MAY_INCLUDE = {
    "kernels": {"kernels"},
    "lib": {"lib", "kernels"},
    "envs": {"envs"},
    "agents": {"agents", "lib"},
    "experiments": {"experiments", "agents", "lib", "envs", "kernels"},
}
CONTRACT = {"envs/environment.h", "envs/random.h", "envs/vector_env.h"}
TORCH_IN_ENVS = re.compile(r"envs/(vector_env|vectorize\w*|registry)\.(h|cpp)$")

SOURCES = {".h", ".hpp", ".cpp", ".cc", ".c", ".cuh", ".cu"}
INCLUDE = re.compile(r"""^\s*#\s*include\s*([<"])([^>"]+)[>"]""", re.MULTILINE)
TORCH = re.compile(r"(torch|ATen|c10|caffe2)/")
HDF5 = re.compile(r"(hdf5|H5\w*|highfive/.*)\.(h|hpp)$|highfive/")


def complaint(path, bracket, header):
    """Why the file `path` (relative to the root) may not include `header`; None if it may."""
    room = path.split("/")[0]
    if bracket == '"' or header.startswith("."):
        return "names of ours are written <retain/...>"
    if header.startswith("retain/"):
        target = header.removeprefix("retain/")
        if target.split("/")[0] in MAY_INCLUDE[room]:
            return None
        if room == "agents" and target in CONTRACT:
            return None
        return f"{room} may include {', '.join(sorted(MAY_INCLUDE[room]))}" + (
            f" and {', '.join(sorted(CONTRACT))}" if room == "agents" else "")
    if TORCH.match(header):
        if room == "kernels":
            return "kernels know no LibTorch"
        if room == "envs" and not TORCH_IN_ENVS.match(path):
            return "in envs only the vector driver knows LibTorch"
    if HDF5.match(header) and not path.startswith("lib/io/"):
        return "only lib/io opens HDF5"
    return None


def includes(root):
    for room in MAY_INCLUDE:
        for file in sorted((root / room).rglob("*")):
            if file.suffix in SOURCES and file.is_file():
                path = file.relative_to(root).as_posix()
                for bracket, header in INCLUDE.findall(file.read_text(encoding="utf-8")):
                    yield path, bracket, header


def violations(root):
    found = []
    for path, bracket, header in includes(root):
        reason = complaint(path, bracket, header)
        if reason:
            found.append(f"{path}: #include {header}: {reason}")
        # A world that reaches LibTorch through the driver's header knows it all the same.
        driver = header.removeprefix("retain/")
        if path.startswith("envs/") and TORCH_IN_ENVS.match(driver) and not TORCH_IN_ENVS.match(path):
            found.append(f"{path}: #include {header}: a world does not know its driver")
    return found


ALLOWED = [
    ("kernels/gru/gru.cpp", "<retain/kernels/common/cpu_isa.h>"),
    ("kernels/gru/gru.cpp", "<vector>"),
    ("lib/ops/gru.cpp", "<retain/kernels/gru/gru.h>"),
    ("lib/ops/gru.cpp", "<torch/library.h>"),
    ("lib/io/checkpoint.cpp", "<hdf5.h>"),
    ("envs/recall.h", "<retain/envs/environment.h>"),
    ("envs/vectorize.cpp", "<ATen/Parallel.h>"),
    ("agents/ppo.cpp", "<retain/lib/state.h>"),
    ("agents/rollout.h", "<retain/envs/vector_env.h>"),
    ("experiments/eval.cpp", "<retain/agents/evaluation.h>"),
    ("experiments/worlds.cpp", "<retain/envs/registry.h>"),
]

FORBIDDEN = [
    ("kernels/gru/gru.cpp", "<retain/lib/state.h>"),
    ("kernels/gru/gru.cpp", "<ATen/core/Tensor.h>"),
    ("kernels/gru/gru.cu", "<c10/util/Exception.h>"),
    ("kernels/gru/gru.h", '"gru_params.h"'),
    ("lib/state.cpp", "<retain/envs/random.h>"),
    ("lib/state.cpp", "<retain/agents/ppo.h>"),
    ("lib/state.cpp", "<hdf5.h>"),
    ("lib/memory.cpp", "<retain/experiments/options.h>"),
    ("envs/recall.h", "<retain/lib/state.h>"),
    ("envs/recall.h", "<retain/kernels/common/cpu_isa.h>"),
    ("envs/recall.h", "<ATen/core/Tensor.h>"),
    ("envs/recall.h", "<retain/envs/vector_env.h>"),
    ("agents/ppo.cpp", "<retain/envs/recall.h>"),
    ("agents/ppo.cpp", "<retain/envs/registry.h>"),
    ("agents/ppo.cpp", "<retain/kernels/gru/gru.h>"),
    ("agents/ppo.cpp", "<retain/experiments/options.h>"),
    ("agents/trainer.cpp", "<hdf5.h>"),
    ("experiments/inspect.cpp", "<H5Cpp.h>"),
    ("experiments/inspect.cpp", "  <../lib/state.h>"),
]


class Layering(unittest.TestCase):
    def test_the_tree_has_only_arrows_of_the_design(self):
        self.assertEqual(violations(ROOT), [])

    def test_the_tree_was_read(self):
        rooms = {path.split("/")[0] for path, _, _ in includes(ROOT)}
        self.assertEqual(rooms, set(MAY_INCLUDE))

    def plant(self, path, line):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, path)
            file.parent.mkdir(parents=True)
            file.write_text(f"#pragma once\n\n  # include {line}  // as planted\n// #include <nothing>\n")
            return violations(pathlib.Path(folder))

    def test_a_planted_arrow_is_found(self):
        for path, line in FORBIDDEN:
            with self.subTest(path=path, line=line):
                self.assertEqual(len(self.plant(path, line)), 1)

    def test_an_allowed_arrow_passes(self):
        for path, line in ALLOWED:
            with self.subTest(path=path, line=line):
                self.assertEqual(self.plant(path, line), [])


if __name__ == "__main__":
    sys.exit(unittest.main())

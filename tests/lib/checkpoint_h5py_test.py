"""A checkpoint opens in h5py as it is. Usage: checkpoint_h5py_test.py <test_lib>"""
import os
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy as np
except ImportError:
    print("skipped: this Python has no h5py")
    sys.exit(77)

with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "sample.h5")
    subprocess.run([sys.argv[1], "--gtest_filter=Checkpoint.IsPlainHdf5BehindItsHeader"],
                   env={**os.environ, "RETAIN_SAMPLE": path}, check=True, stdout=subprocess.DEVNULL)
    ramp = np.arange(6, dtype=np.float32).reshape(2, 3).T
    with h5py.File(path) as file:
        assert file.userblock_size == 512
        assert file["config"].asstr()[()] == "world = рекорд\n"
        assert file["progress/updates"][()] == 12 and file["progress/best"][()] == 0.25
        tensors = file["tensors"]
        for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8"):
            assert tensors[name].dtype == name, (name, tensors[name].dtype)
            assert np.array_equal(tensors[name], ramp.astype(name)), name
            assert tensors[name].attrs["dtype"].decode() == name
        bfloat16 = (tensors["bfloat16"][()].astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(bfloat16, ramp)
        assert np.array_equal(tensors["bool"][()].astype(bool), ramp != 0)
        assert tensors["empty"].shape == (0, 4)
print("h5py reads what the checkpoint writer wrote")

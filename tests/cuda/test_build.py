"""What the CUDA module is built for, and which GPUs that serves."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from unittest import mock

import pytest

from llmkern import _backends

ROOT = Path(__file__).parents[2]
DEFAULT = ("sm_80", "sm_86", "sm_89", "sm_90a", "compute_90")


@pytest.fixture(scope="module")
def setup_script():
    with (
        mock.patch("setuptools.setup"),
        mock.patch.dict(os.environ, {"LLMKERN_BUILD_CUDA": "0"}),
    ):
        return runpy.run_path(str(ROOT / "setup.py"))


def test_default_targets(setup_script):
    assert tuple(setup_script["cuda_targets"](setup_script["CUDA_ARCHES"])) == DEFAULT


@pytest.mark.parametrize(
    ("arch_list", "targets"),
    [
        ("9.0", ["sm_90"]),
        ("8.6+PTX", ["sm_86", "compute_86"]),
        ("8.0 9.0a+PTX", ["sm_80", "sm_90a", "compute_90"]),
        ("8.0;8.0;12.0a", ["sm_80", "sm_120a"]),
    ],
)
def test_arch_lists(arch_list, targets, setup_script):
    assert setup_script["cuda_targets"](arch_list) == targets


def test_flags_pair_virtual_and_real_architectures(setup_script):
    flags = setup_script["gencode_flags"](["sm_90a", "compute_90"])
    assert flags == (
        "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=compute_90"
    )


@pytest.mark.parametrize("entry", ["Hopper", "90", "8.x", "9.0a-PTX"])
def test_unknown_arch_entries_are_refused(entry, setup_script):
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: got '{entry}'"):
        setup_script["cuda_targets"](f"8.0;{entry}")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_default_build_serves_8_0_and_newer(capability):
    assert _backends.refuse_capability(capability, DEFAULT) is None


@pytest.mark.parametrize(
    ("capability", "archs", "reason"),
    [
        ((7, 5), ("sm_75", "compute_75"), "is 7.5, expected 8.0 or newer"),
        ((8, 0), ("sm_86",), "is 8.0, but llmkern._cuda was built for sm_86"),
        ((9, 0), ("sm_80", "sm_89"), "is 9.0, but"),
        ((10, 0), ("sm_90a",), "is 10.0, but"),
        ((8, 9), ("compute_90",), "is 8.9, but"),
        ((9, 0), (), "was built for no GPU"),
    ],
    ids=["too_old", "older_minor", "other_major", "specific_target", "newer_ptx", "nothing"],
)
def test_gpus_that_no_code_serves_are_refused(capability, archs, reason):
    assert reason in (_backends.refuse_capability(capability, archs) or "")

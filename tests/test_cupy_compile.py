"""Every kernel of the CuPy accelerator through NVRTC, which needs no GPU: no warning, no spill, and none forgotten."""

import os

import pytest
from refmodels_cupy import registers
from refmodels_cupy.accelerator import FAMILIES
from refmodels_cupy.registers import ARCHITECTURES, DISTRIBUTIONS, alike, resources, table
from refmodels_cupy.source import DIRECTORY, all_forms, kernels

from refmodels.accelerator import CompileError

FORMS = all_forms(FAMILIES)
EVERY_FORM_FOR = "sm_90"
"""For the others those that are alike count as one, which is half of the time."""


@pytest.fixture(scope="module")
def nvrtc():
    found = registers.nvrtc()
    if found is None and not os.environ.get("REFMODELS_CC"):
        pytest.skip(f"needs NVRTC: pip install {DISTRIBUTIONS[0]}")
    assert found, "there is to be NVRTC here"
    return found


@pytest.mark.parametrize("file", FORMS)
def test_every_form_compiles_and_does_not_spill(nvrtc, capsys, file):
    found = [
        one
        for architecture in ARCHITECTURES
        for one in resources(nvrtc, file, FORMS[file] if architecture == EVERY_FORM_FOR else alike(FORMS[file]), architecture)
    ]
    with capsys.disabled():
        print(f"\n{file}", *table(found), sep="\n")
    assert [one for one in found if one.spilled] == []


def unnamed(file, text):
    """The kernels in a file that no form is of: nothing would compile them."""
    return set(kernels(text)) - {form.partition("<")[0] for form in FORMS.get(file, ())}


@pytest.mark.parametrize("file", sorted(path.name for path in DIRECTORY.glob("*.cu")))
def test_every_kernel_has_a_form(file):
    assert unnamed(file, (DIRECTORY / file).read_text()) == set()


def test_alike_are_forms_that_differ_in_the_kind_of_half():
    forms = ["k<f16, 64>", "k<bf16, 64>", "k<bf16, 80>", "k<float, f16>", "j<f16>"]
    assert alike(forms) == ["k<bf16, 64>", "k<bf16, 80>", "k<float, f16>", "j<f16>"]


def test_the_command(nvrtc, capsys):
    assert registers.main(["softmax.cu", "--for", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["softmax.cu", "FORM", *FORMS["softmax.cu"]]
    assert 0 < int(lines[2].split()[-1]) < 256
    with pytest.raises(SystemExit):
        registers.main(["no.cu"])
    assert "no kernel file: no.cu" in capsys.readouterr().err


# -- planted faults -----------------------------------------------------------------------------------------------------------

A_WARNING = """#include "device.cuh"
template <class T>
__global__ void planted(T* x) {
    int nobody_reads_this;
    x[threadIdx.x] = narrow<T>(1.0f);
}
"""

AN_ERROR = """#include "device.cuh"
template <class T>
__global__ void planted(T* x) {
    x[threadIdx.x] = widen(nothing);
}
"""

A_SPILL = """#include "device.cuh"
template <class T>
__global__ void __launch_bounds__(1024, 2) planted(T* x) {
    float kept[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) kept[i] = widen(x[i * 1024 + threadIdx.x]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; ++i) x[(63 - i) * 1024 + threadIdx.x] = narrow<T>(kept[i]);
}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("source", "said"), [(A_WARNING, r"planted\.cu\(4\): warning"), (AN_ERROR, r"planted\.cu\(4\): error")]
)
def test_a_warning_is_an_error(nvrtc, source, said, architecture):
    with pytest.raises(CompileError, match=said):
        resources(nvrtc, "planted.cu", ["planted<float>"], architecture, source=source)


AN_ARRAY_IN_MEMORY = """#include "device.cuh"
template <class T>
__global__ void planted(T* x, int place) {
    T* rows[3] = {x, x + 7, x + 9};
    x[threadIdx.x] = rows[place][0];
}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_array_in_memory_is_seen(nvrtc, architecture):
    (found,) = resources(nvrtc, "planted.cu", ["planted<float>"], architecture, source=AN_ARRAY_IN_MEMORY)
    assert found.spilled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_spill_is_seen(nvrtc, architecture):
    right, wrong = resources(nvrtc, "planted.cu", ["planted<f16>", "planted<float>"], architecture, source=A_SPILL)
    assert (right.registers, wrong.registers) == (32, 32)
    assert wrong.spilled
    assert "bytes spilled" in table([wrong])[-1]


def test_a_kernel_without_a_form_is_seen():
    text = (DIRECTORY / "softmax.cu").read_text()
    assert unnamed("softmax.cu", text + "template <class T>\n__global__ void forgotten(T* x) {}\n") == {"forgotten"}
    assert unnamed("new.cu", "__global__ void __launch_bounds__(min(32, 64), 2)\n    forgotten(int* x) {}") == {"forgotten"}
    with pytest.raises(ValueError, match="1 kernels"):
        kernels("extern __global__ __attribute__((used)) void forgotten(int* x) {}")

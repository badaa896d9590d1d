"""Counting the instructions of inner loops: on a listing written by hand, counted by hand."""

import importlib.util
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "count_instructions.py"

# An outer loop (from .L_x_0) around an inner one with tensor core work (from .L_x_1), then a loop
# without any (from .L_x_3); .L_x_2 is a branch forward, hence no loop.
LISTING = """
.text.mosaic_gpu_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   MOV R4, RZ ;
.L_x_1:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0030*/                   MUFU.EX2 R8, R9 ;
        /*0040*/              @!P1 FFMA R8, R9, R10, R11 ;
        /*0050*/                   F2FP.BF16.F32.PACK_AB R8, R9, R8 ;
        /*0060*/                   LOP3.LUT R5, R6, 0xf, R7, 0xf8, !PT ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/             @!UP0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/               @P2 BRA `(.L_x_0) ;
.L_x_3:
        /*00a0*/                   STG.E desc[UR4][R2.64], R8 ;
        /*00b0*/               @P3 BRA `(.L_x_3) ;
        /*00c0*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("count_instructions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_innermost_loops_with_tensor_core_work_are_counted(script):
    [body] = script.tensor_loops(LISTING)
    assert [text.split()[0] for text in body if not text.startswith("@")] == [
        *("HGMMA.64x128x16.F32.BF16", "MUFU.EX2", "F2FP.BF16.F32.PACK_AB", "LOP3.LUT")
    ]
    assert len(body) == 7
    without = LISTING.replace("HGMMA.64x128x16", "NOP.64x128x16")
    assert list(script.tensor_loops(without)) == []


def test_a_loop_whose_inner_loop_has_no_tensor_core_work_counts_as_a_whole(script):
    listing = LISTING.replace("MOV R4, RZ", "QGMMA.64x8x32.F32.E4M3.E4M3 R4, gdesc[UR4], R4")
    listing = listing.replace("HGMMA.64x128x16", "NOP.64x128x16")
    [body] = script.tensor_loops(listing)
    assert len(body) == 9


def test_cycles_are_those_of_the_programming_guide(script):
    [body] = script.tensor_loops(LISTING)
    assert script.cycles(body) == {
        "issue": 7.0,
        "exp2": 8.0,  # 128 lanes over 16 results a cycle
        "f32": 1.0,
        "convert": 2.0,
        "int": 2.0,
        "tensor": 64 * 128 * 16 / 2048,
    }
    fp8 = ["QGMMA.64x128x32.F32.E4M3.E4M3 R4, gdesc[UR4], R4"]
    assert script.cycles(fp8)["tensor"] == 64.0  # twice the work at twice the rate


@pytest.mark.parametrize(
    "instruction, name",
    [
        ("@!P0 HADD2.BF16_V2 R1, R2, R3", "f16"),
        ("I2FP.F32.S32 R1, R2", "convert"),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "int"),
        ("@UP1 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", "sync"),
        ("LDSM.16.MT88.4 R8, [R4]", "shared"),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "shuffle"),
        ("LDG.E.128 R4, desc[UR4][R2.64]", "global"),
        ("UMOV UR4, 0x400", "uniform"),
        ("R2UR UR4, R5", "move"),
        ("EXIT", "other"),
    ],
)
def test_instructions_fall_into_their_class(script, instruction, name):
    assert script.class_of(instruction) == name


def test_a_missing_tool_is_one_clear_line(script, capsys):
    assert script.main(["--ptxas", "no-such-tool"]) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert "no-such-tool" in line and "--ptxas" in line

"""Every kernel compiles for every GPU generation, without a GPU, and takes of it what the committed table says."""

import json

import pytest

from tests.kernels import resources


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    found = resources.measured_elsewhere(tmp_path_factory.mktemp("resources") / "resources.json")
    print(resources.table(found))
    return found


@pytest.fixture(scope="module")
def committed():
    return json.loads(resources.COMMITTED.read_text())


def test_table_has_every_form(measured, committed):
    assert set(measured["forms"]) == set(committed["forms"]), "regenerate: python -m tests.kernels.resources"


def test_no_spills(measured):
    assert {name: row["spills"] for name, row in measured["forms"].items() if row["spills"]} == {}


def test_rows_of_values_are_loaded_16_bytes_at_a_time(measured):
    narrow = {name: row["loads"] for name, row in measured["forms"].items() if row["wide"] and "16" not in row["loads"]}
    assert narrow == {}
    assert any(row["wide"] for row in measured["forms"].values())


def test_as_committed(measured, committed):
    """Registers within 10%, shared memory and the loads of each width exactly."""
    if measured["triton"] != committed["triton"]:
        pytest.skip(f"the table is of Triton {committed['triton']}, this is {measured['triton']}")
    for name, want in committed["forms"].items():
        have = measured["forms"][name]
        assert abs(have["registers"] - want["registers"]) <= 0.1 * want["registers"], (name, have, want)
        assert {**have, "registers": None} == {**want, "registers": None}, name


def test_widths_read_from_code():
    code = """
    /*0580*/  LEA.HI.X R39, R22, R3, R21, 0x2, P6 ;
    /*05a0*/  @P2 LDG.E.128 R4, desc[UR16][R18.64] ;
    /*05b0*/  LDG.E.64.CONSTANT R4, desc[UR16][R18.64] ;
    /*05c0*/  LDG.E R4, desc[UR16][R18.64] ;
    /*05d0*/  LDG.E.U16 R4, [R18.64] ;
    /*05e0*/  LDG.E R4, [R18.64+0x10] ;
    """
    assert resources.load_widths(code) == {"16": 1, "8": 1, "4": 2, "2": 1}

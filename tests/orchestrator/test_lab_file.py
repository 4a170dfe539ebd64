"""The lab file: what it takes, and what it says of one that is wrong. Needs no root."""

import json
from pathlib import Path

import pytest

from gangline.orchestrator.job_errors import JobFileError
from gangline.orchestrator.lab_file import LabFile, load_lab

EXAMPLES = Path(__file__).parents[2] / "examples" / "labs"


def problems_of(text: str) -> list[str]:
    with pytest.raises(JobFileError) as error:
        load_lab(text + "\n")
    return str(error.value).splitlines()


def test_the_defaults_make_a_lab():
    lab = LabFile()
    assert lab.host_names == ("host0", "host1")
    assert lab.head == "host0"
    assert (lab.fabric.num_leaves, lab.fabric.num_spines) == (1, 0)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load(path):
    lab = load_lab(path)
    assert lab.name == path.stem.replace("_", "-").removesuffix("-400mbit")


def test_there_are_examples_for_every_fabric():
    fabrics = [load_lab(path).fabric for path in EXAMPLES.glob("*.yaml")]
    assert {(fabric.kind, fabric.planes) for fabric in fabrics} >= {
        ("star", 1),
        ("leaf_spine", 1),
        ("leaf_spine", 2),
    }


def test_a_lab_file_that_was_written_out_loads_as_the_same_lab():
    for lab in [LabFile(), *map(load_lab, EXAMPLES.glob("*.yaml"))]:
        assert LabFile.model_validate_json(json.dumps(lab.model_dump(mode="json"))) == lab


def test_hosts_may_have_names_and_cpus():
    lab = load_lab("hosts: [{name: big, cpus: 8}, {name: small}]\nray: {cpus_per_host: 1}\n")
    assert lab.host_names == ("big", "small")
    assert [lab.cpus_of(name) for name in lab.host_names] == [8, 1]
    assert lab.head == "big"


def test_a_file_without_a_name_is_called_as_the_file(tmp_path):
    path = tmp_path / "My Lab.yaml"
    path.write_text("hosts: 3\n")
    assert load_lab(path).name == "my-lab"
    assert load_lab(path, ["name=other"]).name == "other"


def test_every_fault_of_a_file_is_named_with_its_place_and_mend():
    found = problems_of("hosts: three\nrate: 4\nfabric: {kind: leafspine}\nmtu: 70000")
    assert [line.split(": ")[0:2] for line in found] == [
        ["lab file:1:8", "hosts"],
        ["lab file:2:1", "rate"],
        ["lab file:3:16", "fabric.kind"],
        ["lab file:4:6", "mtu"],
    ]
    assert found[1].endswith("did you mean rate_mbit?")
    assert found[2].endswith("did you mean leaf_spine?")
    assert found[3].endswith("lower it to at most 65000")


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("hosts: 65", "hosts", "from 1 to 64"),
        ("hosts: 0", "hosts", "from 1 to 64"),
        ("hosts: [{name: a}, {name: a}]", "hosts", "a is there twice"),
        ("hosts: [{name: spine0}]", "hosts", "rename the host"),
        ("hosts: [{nam: a}]", "hosts[0].nam", "did you mean name?"),
        ("hosts: [{name: 7}]", "hosts[0].name", "quote it"),
        ("ray: {head: nobody}", "ray.head", "there is no host nobody"),
        ("ray: {health: {period_s: 400ms}}", "ray.health.period_s", "write 0.4 (seconds)"),
        ("fabric: {leaves: 2}", "fabric.leaves", "a star has none"),
        ("uplink_mbit: 100", "uplink_mbit", "a star has none"),
        ("fabric: {kind: leaf_spine, leaves: 3}", "fabric.leaves", "at most one leaf per host"),
        ("rate_mbit: .inf", "rate_mbit", "number"),
        ("rate_mbit: 0", "rate_mbit", "raise it to at least 1"),
        ("name: Bad Name", "name", "bad-name"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field_and_the_mend(text, field, words):
    (line,) = [line for line in problems_of(text) if f" {field}: " in line]
    assert words in line


def test_yaml_surprises_are_refused():
    assert "no aliases" in problems_of("hosts: &a 2\nrate_mbit: *a")[-1]
    assert "each key once" in problems_of("hosts: 2\nhosts: 3")[0]


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(JobFileError, match=r"no file that can be read .*allowed: a lab file"):
        load_lab(tmp_path / "none.yaml")

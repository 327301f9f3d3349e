"""The table of devices, and files that add to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.errors import ConfigError
from pipekit.predictions.devices import Device, Link, find_device, list_devices

DEVICES = list_devices()
NAMES = [
    "v100-16gb", "v100-32gb", "a100-40gb", "a100-80gb", "h100", "h200", "b200", "gh200", "l40s", "a10g", "rtx-4090",
    "mi250x", "mi300x", "cpu",
]  # fmt: skip

OWN = """\
my-gpu:
  memory_bytes: 48e9
  peak_flops: {fp32: 20e12, tf32: 40e12, bf16: 80e12, fp16: 80e12}
  memory_bandwidth: 1e12
  intra_node: {bandwidth: 32e9, latency_s: 10e-6}
  devices_per_node: 2
  inter_node: {bandwidth: 1e9, latency_s: 50e-6}
  efficiency: 0.4
  aliases: [mine]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "devices.yaml"


def refusal(file: Path, text: str) -> str:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        find_device("h100", [file])
    return str(error.value)


def test_the_table_holds_what_people_train_on() -> None:
    assert [device.name for device in DEVICES] == NAMES


def test_figures_of_data_sheets() -> None:
    a100, h100, h200 = (find_device(name) for name in ("a100-80gb", "h100", "h200"))
    assert (a100.peak_flops.bf16, a100.memory_bandwidth, a100.intra_node.bandwidth) == (312e12, 2039e9, 240e9)
    assert (h100.peak_flops.bf16, h100.memory_bandwidth, h100.intra_node.bandwidth) == (989.4e12, 3350e9, 370.8e9)
    assert (h200.memory_bytes, h200.memory_bandwidth, h200.peak_flops) == (141 * 10**9, 4800e9, h100.peak_flops)
    assert find_device("v100-32gb").peak_flops.fp16 == 125e12
    assert find_device("mi300x").peak_flops.bf16 == 1307.4e12


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_figures_are_in_their_units(device: Device) -> None:
    peak = device.peak_flops
    assert 1e9 <= device.memory_bytes <= 1e12
    assert peak.fp32 <= peak.tf32 <= peak.fp16
    assert peak.fp32 <= peak.bf16 <= peak.fp16
    assert 0.5 <= device.efficiency <= 0.9
    # Memory is faster than the link to a neighbour, which is faster than the network.
    assert device.memory_bandwidth > device.intra_node.bandwidth > device.inter_node.bandwidth
    assert 1e-6 <= device.intra_node.latency_s <= device.inter_node.latency_s <= 1e-3
    assert device.devices_per_node in (4, 8)
    # Operations for each byte that memory delivers.
    assert 5 <= peak.fp16 / device.memory_bandwidth <= 500


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_figure_has_a_source(device: Device) -> None:
    if device.name == "cpu":
        assert "guess" in device.source
        assert "partition: profile" in device.source
    else:
        assert device.source.startswith("https://")
        assert "https://" in device.efficiency_source or device.efficiency_source.startswith(("as ", "a guess, as "))


def test_every_gpu_knows_its_processors() -> None:
    assert {device.name for device in DEVICES if device.processors is None} == {"cpu"}
    assert all(50 <= device.processors <= 400 for device in DEVICES if device.processors)


def test_no_two_devices_share_a_name() -> None:
    names = [name for device in DEVICES for name in (device.name, *device.aliases)]
    assert len(names) == len(set(names))
    assert all(find_device(name).name == device.name for device in DEVICES for name in (device.name, *device.aliases))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100", "h100"),
        ("rtx_4090", "rtx-4090"),
        ("a100", "a100-80gb"),
        # What torch.cuda.get_device_name returns.
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_are_found_as_they_are_written(name: str, found: str) -> None:
    assert find_device(name).name == found


def test_an_unknown_name_is_refused_with_the_one_that_is_close() -> None:
    with pytest.raises(ConfigError, match=r"device=h1000: no such device; did you mean h100\? Write v100-16gb, .* cpu"):
        find_device("h1000")
    with pytest.raises(ConfigError, match="device=abacus: no such device; Write v100-16gb"):
        find_device("abacus")


def test_a_message_takes_latency_and_bandwidth() -> None:
    assert Link(bandwidth=10.0, latency_s=1.0).transfer_s(20) == 3.0


def test_a_file_adds_a_device(file: Path) -> None:
    file.write_text(OWN, encoding="utf-8")
    device = find_device("mine", [file])
    assert device.name == "my-gpu"
    assert device.memory_bytes == 48 * 10**9
    assert device.matmul_flops("bf16") == pytest.approx(32e12)
    assert device.source == device.efficiency_source == str(file)
    assert [known.name for known in list_devices([file])] == [*NAMES, "my-gpu"]
    assert "my-gpu" not in [known.name for known in list_devices()]


def test_a_file_changes_some_keys_of_a_device(file: Path) -> None:
    before = find_device("h100")
    file.write_text("h100:\n  efficiency: 0.6\n  inter_node: {bandwidth: 12.5e9}\n", encoding="utf-8")
    after = find_device("h100", [file])
    assert (after.efficiency, after.efficiency_source) == (0.6, str(file))
    assert after.inter_node == before.inter_node.model_copy(update={"bandwidth": 12.5e9})
    assert (after.peak_flops, after.intra_node, after.memory_bytes) == (
        before.peak_flops,
        before.intra_node,
        before.memory_bytes,
    )
    assert after.source == f"{file}; {before.source}"
    assert find_device("h100") == before


def test_the_last_file_holds(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(OWN, encoding="utf-8")
    second.write_text("my-gpu: {efficiency: 0.2, source: measured}\n", encoding="utf-8")
    device = find_device("my-gpu", [first, second])
    assert (device.efficiency, device.source, device.devices_per_node) == (0.2, "measured", 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h100:\n  efficiency: 1.5\n", ":2: h100.efficiency=1.5: must be a number greater than 0 and at most 1"),
        ("h100:\n  memory_bytes: 80.5\n", ":2: h100.memory_bytes=80.5: must be a whole number greater than 0"),
        ("h100:\n  memory_bytes: 80 GB\n", ":2: h100.memory_bytes='80 GB': must be a whole number greater than 0"),
        ("h100:\n  inter_node: 3\n", ":2: h100.inter_node=3: must be a mapping; for example inter_node: {bandwidth: "),
        ("h100:\n  peak_flops:\n    bf16: -1\n", ":3: h100.peak_flops.bf16=-1: must be a number greater than 0"),
        (
            "h100:\n  inter_node:\n    bandwith: 1\n",
            ":3: h100.inter_node.bandwith: unknown key; did you mean bandwidth?",
        ),
        ("h100:\n  price: 1\n", ":2: h100.price: unknown key; the keys are memory_bytes, reserve_bytes, peak_flops, "),
        ("h100:\n  name: x\n", ":2: h100.name: unknown key; the name stands above the keys"),
        ("h100:\n  aliases: [1]\n", ":2: h100.aliases=1: must be a list with every entry text"),
        ("h100: fast\n", ":1: h100=fast: must be a mapping of keys"),
        ("- h100\n", ": must be devices by name; for example my-gpu: "),
        ("", ": must be devices by name"),
        ("h100: {\n", ": not valid YAML"),
        ("h100:\n  efficiency: .nan\n", ":2: h100.efficiency=nan: must be a number"),
    ],
)
def test_a_wrong_file_is_refused_where_it_is_wrong(file: Path, text: str, says: str) -> None:
    assert says in refusal(file, text)
    assert refusal(file, text).startswith(str(file))


def test_what_a_new_device_lacks_is_named_all_at_once(file: Path) -> None:
    message = refusal(file, "my-gpu:\n  peak_flops: {fp32: 1e12}\n")
    assert message.startswith("9 mistakes")
    for key in ("memory_bytes", "peak_flops.bf16", "memory_bandwidth", "intra_node", "devices_per_node", "efficiency"):
        assert f"my-gpu.{key}: missing" in message
    assert "memory_bytes: missing, and it has no default; for example memory_bytes: 80e9" in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file or directory"):
        find_device("h100", [tmp_path / "none.yaml"])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a text file"):
        find_device("h100", [tmp_path / "binary.yaml"])


def test_a_gpu_keeps_a_reserve_that_a_file_may_change(tmp_path: Path) -> None:
    h100, cpu = find_device("h100"), find_device("cpu")
    assert (h100.memory_bytes - h100.usable_bytes, cpu.usable_bytes) == (5_500_000_000, cpu.memory_bytes)
    path = tmp_path / "devices.yaml"
    path.write_text("h100:\n  reserve_bytes: 8e9\n")
    assert find_device("h100", [path]).usable_bytes == 72_000_000_000

"""Devices and the networks between them, by the figures that are published of them.

The figures and their sources stand in `devices.yaml`, beside this file. A YAML file of the same form adds devices, or
changes those that are there: keys that it leaves out keep their figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from pipekit.errors import ConfigError
from pipekit.settings.base import Section, alternatives, config_error, show
from pipekit.settings.faults import rule_of
from pipekit.settings.suggest import closest
from pipekit.settings.yaml_source import YamlSource, read_yaml

MatmulFormat = Literal["fp32", "tf32", "bf16", "fp16"]
"""Number format of a matrix product, which decides its speed."""

_TABLE = Path(__file__).with_name("devices.yaml")
_VENDOR_WORDS = {"nvidia", "amd", "instinct", "tesla", "geforce"}


def _whole(value: object) -> object:
    """Return 80e9 as the whole number that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def gpu_reserve_bytes(memory_bytes: int) -> int:
    """Estimated bytes of a GPU's memory that are not available to tensors.

    The context and its loaded kernels take 0.5e9, the buffers of communicators and the workspaces of matmuls 1e9, and
    the gaps that the caching allocator leaves a twentieth of the memory.

    Source: https://github.com/pytorch/pytorch/issues/107667 (300 MB of context with kernels loaded lazily);
    https://github.com/Lumi-supercomputer/LUMI-AI-Guide/issues/111 (1 GiB with the first communicator);
    `CUBLAS_WORKSPACE_CONFIG` in the CUDA semantics of torch (8 MiB a handle and stream, 32 MiB on Hopper).

    Example:
        >>> gpu_reserve_bytes(80_000_000_000)
        5500000000
    """
    return 1_500_000_000 + memory_bytes // 20


class Link(Section):
    """Link between devices."""

    bandwidth: PositiveFloat = Field(examples=["240e9"])
    """Bytes per second that a device can send, and as many that it can receive meanwhile."""

    latency_s: NonNegativeFloat = Field(examples=["3.4e-6"])
    """Seconds until a message without content has arrived."""

    start_s: NonNegativeFloat = Field(default=0.0, examples=["8.4e-6"])
    """Seconds that a message, or a collective of any number of messages, takes to begin."""

    def transfer_s(self, num_bytes: float) -> float:
        """Return the seconds until a message has arrived.

        Example:
            >>> Link(bandwidth=100.0, latency_s=0.5).transfer_s(25)
            0.75
        """
        return self.start_s + self.latency_s + num_bytes / self.bandwidth


class PeakFlops(Section):
    """Floating-point operations per second of large matmuls, without sparsity, by precision."""

    fp32: PositiveFloat = Field(examples=["19.5e12"])
    """32 bits throughout."""

    tf32: PositiveFloat = Field(examples=["156e12"])
    """32 bits that are multiplied with 10 bits of mantissa; what fp32 reaches where the device has no tf32."""

    bf16: PositiveFloat = Field(examples=["312e12"])
    """bfloat16, accumulated in fp32; what fp32 reaches where the device has no bf16."""

    fp16: PositiveFloat = Field(examples=["312e12"])
    """float16, accumulated in fp32."""


class Device(Section):
    """Speed, memory and links of one device."""

    name: str = Field(min_length=1)
    """Its name in the table."""

    memory_bytes: Annotated[PositiveInt, BeforeValidator(_whole)] = Field(examples=["80e9"])
    """Memory of the device."""

    reserve_bytes: Annotated[NonNegativeInt | None, BeforeValidator(_whole)] = Field(default=None, examples=["5e9"])
    """Memory that tensors do not get: context, communicators, workspaces, and gaps between tensors; that of a GPU
    unless given."""

    peak_flops: PeakFlops = Field(examples=[{"fp32": "19.5e12", "tf32": "156e12", "bf16": "312e12", "fp16": "312e12"}])
    """Floating-point operations per second of large matmuls, without sparsity, by precision."""

    memory_bandwidth: PositiveFloat = Field(examples=["2039e9"])
    """Bytes per second between the device and its memory."""

    intra_node: Link = Field(examples=[{"bandwidth": "240e9", "latency_s": "3.4e-6"}])
    """The link to the other devices of its node."""

    host_link: PositiveFloat = Field(default=25e9, examples=["25e9"])
    """Bytes per second between the device and host memory, in each direction: about what a PCIe 4.0 x16 link of
    31.5e9 carries."""

    host_memory_bandwidth: PositiveFloat = Field(default=25e9, examples=["25e9"])
    """Bytes per second between this device's share of the host's cores and their memory, for updates of offloaded
    states: two sockets with 8 channels of DDR4-3200, of 205e9 each, over 8 devices, of which half is reached."""

    nvme_bandwidth: PositiveFloat = Field(default=1.6e9, examples=["1.6e9"])
    """Bytes per second between this device's share of the host and its NVMe drives, as measured for each of 16 GPUs of
    a DGX-2 (Rajbhandari et al. 2021, ZeRO-Infinity, figure 2)."""

    devices_per_node: PositiveInt = Field(examples=[8])
    """Devices that share a node."""

    inter_node: Link = Field(examples=[{"bandwidth": "25e9", "latency_s": "14e-6"}])
    """The network to devices of other nodes."""

    efficiency: float = Field(gt=0, le=1, examples=[0.8])
    """Share of the peak that large matmuls reach."""

    processors: PositiveInt | None = Field(default=None, examples=[108])
    """Processors that compute tiles of a matmul at a time, so that its time depends on its shape; None counts
    operations alone, all at the same speed, and nothing that is no matmul."""

    attention_efficiency: float = Field(default=0.35, gt=0, le=1, examples=[0.35])
    """Share of the peak that a fused attention, forward and backward, reaches for long sequences."""

    launch_s: NonNegativeFloat = Field(default=100e-6, examples=[100e-6])
    """Seconds that a layer's forward, or its backward, takes at least, however small the micro-batch: about ten kernels
    are started for it, one every ten microseconds."""

    aliases: tuple[str, ...] = Field(default=(), strict=False)
    """Other names that it is found by."""

    source: str = Field(min_length=1)
    """Source of the figures."""

    efficiency_source: str = Field(min_length=1)
    """Source of `efficiency`."""

    @property
    def usable_bytes(self) -> int:
        """Memory for tensors."""
        reserve_bytes = gpu_reserve_bytes(self.memory_bytes) if self.reserve_bytes is None else self.reserve_bytes
        return max(1, self.memory_bytes - reserve_bytes)

    def matmul_flops(self, precision: MatmulFormat) -> float:
        """Return the floating-point operations per second that large matmuls reach.

        Example:
            >>> round(find_device("a100-80gb").matmul_flops("bf16") / 1e12)
            271
        """
        peak: float = getattr(self.peak_flops, precision)
        return peak * self.efficiency


def list_devices(extra_files: Iterable[str | Path] = ()) -> tuple[Device, ...]:
    """Return the devices of the table, with those of your own files.

    Args:
        extra_files: YAML files in the form of `devices.yaml`; a later one changes what an earlier one says.

    Raises:
        ConfigError: if a file cannot be read, or what it says of a device is wrong or incomplete.
    """
    values = {name: dict(keys) for name, keys in _published().items()}
    for path in extra_files:
        source = _read(Path(path))
        for name, keys in source.value.items():
            values[name] = _changed(values.get(name, {}), keys, path)
        _check(values, source, path)
    return tuple(Device.model_validate({"name": name, **keys}) for name, keys in values.items())


def find_device(name: str, extra_files: Iterable[str | Path] = ()) -> Device:
    """Return a device by its name, an alias, or what `torch.cuda.get_device_name` calls it.

    Args:
        name: such as `h100`; case does not matter.
        extra_files: YAML files in the form of `devices.yaml`; a later one changes what an earlier one says.

    Raises:
        ConfigError: if there is none, with the names that are close; or if a file is wrong.

    Example:
        >>> find_device("NVIDIA A100-SXM4-80GB").name
        'a100-80gb'
    """
    devices = list_devices(extra_files)
    found: dict[str, Device] = {}
    for device in devices:
        found |= dict.fromkeys(map(_plain, device.aliases), device)
    found |= {_plain(device.name): device for device in devices}
    if _plain(name) in found:
        return found[_plain(name)]
    match = closest(_plain(name), found)
    guess = f"did you mean {found[match].name}? " if match else ""
    known = alternatives(device.name for device in devices)
    raise ConfigError(
        f"device={show(name)}: no such device; {guess}Write {known}, or describe yours in a YAML file of devices"
    )


def _plain(name: str) -> str:
    """Return a name without what does not tell devices apart.

    Example:
        >>> _plain("NVIDIA GeForce RTX 4090"), _plain("Tesla V100-SXM2-32GB")
        ('rtx-4090', 'v100-sxm2-32gb')
    """
    words = name.casefold().replace("_", " ").replace("-", " ").split()
    return "-".join(word for word in words if word not in _VENDOR_WORDS)


@cache
def _published() -> Mapping[str, Mapping[str, Any]]:
    values: Mapping[str, Mapping[str, Any]] = _read(_TABLE).value
    return values


def _read(path: Path) -> YamlSource:
    """Keys of a file, by name of the device."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a YAML file of devices") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8; give a YAML file of devices") from None
    source = read_yaml(text)
    faults = list(source.faults)
    if not faults and not isinstance(source.value, dict):
        faults = [(None, "must be devices by name; for example my-gpu: {memory_bytes: 80e9, ...}")]
    elif not faults:
        faults = [
            (source.lines[(name,)], f"{name}={show(keys)}: must be a mapping of keys; for example efficiency: 0.8")
            for name, keys in source.value.items()
            if not isinstance(keys, dict)
        ]
    if faults:
        raise config_error(f"{_place(path, line)}: {message}" for line, message in faults)
    return source


def _changed(before: Mapping[str, Any], keys: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the keys of a device with some of them changed, those of its links and its peak one by one."""
    source = f"{path}; {before['source']}" if before else str(path)
    efficiency_source = str(path) if "efficiency" in keys else before.get("efficiency_source", str(path))
    after = {**before, "source": source, "efficiency_source": efficiency_source, **keys}
    for key in ("peak_flops", "intra_node", "inter_node"):
        if isinstance(keys.get(key), dict) and isinstance(before.get(key), dict):
            after[key] = {**before[key], **keys[key]}
    return after


def _check(values: Mapping[str, Any], source: YamlSource, path: str | Path) -> None:
    """Refuse what a file says of devices, with all mistakes at once, each with its line."""
    faults = []
    for name in source.value:
        try:
            Device.model_validate({**values[name], "name": name})
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                key = tuple(part for part in detail["loc"] if isinstance(part, str))
                line = _line(source, (name, *key))
                faults.append((line, f"{'.'.join((name, *key))}{_rule(key, detail)}"))
        if "name" in source.value[name]:
            line = _line(source, (name, "name"))
            faults.append((line, f"{name}.name: unknown key; the name stands above the keys, so remove it"))
    if faults:
        raise config_error(f"{_place(path, line)}: {message}" for line, message in sorted(faults))


def _rule(key: tuple[str, ...], detail: Any) -> str:
    """Fault of a key, to stand behind it in a message."""
    model: type[BaseModel] = Device
    for part in key[:-1]:
        annotation = model.model_fields[part].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    known = [field for field in model.model_fields if field != "name"]
    if detail["type"] == "extra_forbidden":
        match = closest(key[-1], known)
        remedy = f"did you mean {match}?" if match else f"the keys are {alternatives(known, 'and')}"
        return f": unknown key; {remedy}"
    field = model.model_fields[key[-1]]
    example = f"; for example {key[-1]}: {show(field.examples[0])}" if field.examples else ""
    if detail["type"] == "missing":
        return f": missing, and it has no default{example}"
    return f"={show(detail['input'])}: must be {rule_of(field.annotation, field.metadata)}{example}"


def _line(source: YamlSource, key: tuple[str, ...]) -> int:
    """Return the line of a key, or of the nearest above it that is there."""
    return next(source.lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in source.lines)


def _place(path: str | Path, line: int | None) -> str:
    return f"{path}:{line}" if line else str(path)

"""From the parallel section to a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipekit.layout import Layout, plan_layout

if TYPE_CHECKING:
    from pipekit.config.schema import Config


def resolve_layout(config: Config, *, world_size: int | None = None, num_devices: int | None = None) -> Layout:
    """Return the layout that the parallel section asks for.

    Args:
        config: the configuration.
        world_size: the number of processes, where a launcher has already started them.
        num_devices: the number of GPUs present; None on a machine without, where `parallel.dp: auto` means 1.

    Raises:
        LayoutError: if the degrees do not fit the processes or the devices.
    """
    asked = config.parallel.model_dump(include={"pp", "tp", "dp", "order"})
    return plan_layout(**asked, world_size=world_size, num_devices=num_devices)

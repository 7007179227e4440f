"""Models: loading, adapters, export."""

from __future__ import annotations

from flex.model.hub_code import keep_out

keep_out()  # before anything imports PEFT

"""Ship an edit: as a LoRA adapter (`to_peft`) or with the whole model (`export_model`, `restore_exported`)."""

from __future__ import annotations

from fastedit.export.hf import export_model, restore_exported
from fastedit.export.peft import to_peft

__all__ = ["export_model", "restore_exported", "to_peft"]

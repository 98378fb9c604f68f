"""How an adapter's files say what loads them, to readers and to a PEFT that does not know the method."""

from pathlib import Path

from peft_pcgrow.adapter.register import NAME
from peft_pcgrow.files import write_whole

# the peft_type of an adapter_config.json: where the package was not imported, PEFT raises a KeyError with this text
SPELLED_OUT = f"{NAME}: needs `pip install peft-pcgrow`, and `import peft_pcgrow` before loading"
HEADING = "## Loading"
USAGE = f"""{HEADING}

This adapter's method, {NAME}, is not part of PEFT: `pip install peft-pcgrow`, and import it before any loader.

```python
import peft_pcgrow
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this adapter")
```
"""


def add_usage(folder: Path) -> None:
    """Tell in the model card that PEFT has written there, if it has, and once."""
    card = folder / "README.md"
    if card.is_file() and USAGE.strip() not in (text := card.read_text(encoding="utf-8")):
        write_whole(card, f"{text.rstrip()}\n\n{USAGE}".encode())

"""Train a model with a memory by other people's programs, and measure it with one: TRL, PEFT and lm-eval.

``python examples/other_peoples_tools.py CHECKPOINT`` takes a model that ``save_pretrained`` has written (that of
`make demo`, say; a small random one unless one is named), lets TRL's SFTTrainer train an adapter of PEFT's on all its
linear layers, those of its memories too, merges it, and asks lm-eval how likely texts are before and after. The
packages are those of ``pip install 'fwpkm[ecosystem]'``.
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from fwpkm.models import FwPKMForCausalLM
from fwpkm.models.presets import preset

TEXTS = [f"The square of {i} is {i * i}, and that of {i + 1} is {(i + 1) ** 2}." for i in range(64)]
UNSEEN = ["The square of 70 is 4900, and that of 71 is 5041."]


def main(checkpoint: str, out: Path, steps: int = 12) -> None:
    def measure(what: str, folder: str) -> None:
        model = HFLM(pretrained=folder, device="cpu", dtype="float32", trust_remote_code=True)
        asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(UNSEEN)]
        found = sum(model.loglikelihood_rolling(asked, disable_tqdm=True))
        print(f"{what}: {-found / sum(len(text.encode()) for text in UNSEEN):.3f} nats a byte")

    measure("before", checkpoint)
    trainer = SFTTrainer(
        checkpoint,
        args=SFTConfig(
            str(out / "trainer"), max_steps=steps, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[]
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(out / "merged")
    measure("after ", str(out / "merged"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if len(sys.argv) > 1:
            named = sys.argv[1]
        else:
            torch.manual_seed(0)
            FwPKMForCausalLM(preset("tiny")).save_pretrained(folder / "random")
            named = str(folder / "random")
        main(named, folder)

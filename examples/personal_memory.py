"""A memory of your own notes that outlives the program: read, ask, come back, forget.

``python examples/personal_memory.py CHECKPOINT`` takes a model that can recall: `fwpkm demo` trains one and
leaves it in out/demo/checkpoint. Without one this page trains it for half a minute first, for sentences of the form
below.
"""

import sys
import tempfile
from pathlib import Path

from fwpkm import Session
from fwpkm.data.text import load_split, standard_library
from fwpkm.demo import DemoSettings, for_sequences, new_model
from fwpkm.models import FwPKMForCausalLM
from fwpkm.training.needles import NeedleTraining, train

NOTES = {
    "garage.txt": "The secret number for ID-bike is 407183.\nThe secret number for ID-gate is 918254.\n",
    "house.txt": "The secret number for ID-door is 526871.\nThe secret number for ID-safe is 730946.\n",
}


def small_model(steps: int = 30) -> FwPKMForCausalLM:
    settings = DemoSettings()
    model, (text, _) = new_model(settings, memory=True), load_split(standard_library())
    for record in train(model, text, NeedleTraining(steps=steps, batch=8)):
        if record["step"] % 10 == 0:
            print(f"step {record['step']}: {record['digit_accuracy']:.0%} of the digits")
    return for_sequences(model, settings.chunk)


def ask(session: Session, name: str) -> str:
    answer = session.ask(f"The secret number for ID-{name} is ", max_new_tokens=6)
    print(f"  {name}: {answer}")
    return answer


def main(model: FwPKMForCausalLM) -> None:
    model.eval()
    session = Session(model)
    print("Before reading:")
    ask(session, "bike")
    for name, text in NOTES.items():
        session.read(text, name=name)
    with tempfile.TemporaryDirectory() as folder:
        size = session.save(f"{folder}/notes")
        print(f"Saved, {size:,} bytes. In another program:")
        session = Session.load(f"{folder}/notes", model)
    found = [ask(session, name) for name in ("bike", "gate", "door", "safe")]
    right = sum(answer in text for answer in found for text in NOTES.values())
    session.forget("house.txt")
    print("Without house.txt:")
    ask(session, "bike"), ask(session, "door")
    print(f"{right} of 4 recalled; it now knows {', '.join(session.documents)}.")


if __name__ == "__main__":
    main(FwPKMForCausalLM.from_pretrained(Path(sys.argv[1])) if len(sys.argv) > 1 else small_model())

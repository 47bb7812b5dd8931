"""flyweight's losses in a Hugging Face Trainer: a smaller network learns from a teacher's answers, without labels.

python examples/hf_trainer.py       (needs: pip install transformers accelerate)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.face.digits import accuracy, load_digits, trained
from flyweight.recover import losses


def small() -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))


def main(folder: Path = Path("out-hf-trainer"), epochs: int = 8) -> None:
    try:
        import accelerate  # noqa: F401, the Trainer does nothing without it
        import transformers
    except ImportError:
        raise SystemExit("this example needs the Trainer: pip install transformers accelerate") from None
    digits = load_digits()
    teacher = trained(seed=0, digits=digits)

    class Taught(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *given: Any, **more: Any) -> Tensor:
            with torch.no_grad():
                wanted = teacher(inputs["images"])
            return losses.soft_labels(model(inputs["images"]), wanted, temperature=2.0)

    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        remove_unused_columns=False,  # it would look for them in the signature of forward
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    student = small()
    Taught(model=student, args=settings, train_dataset=[{"images": one} for one in digits.train[0]]).train()
    print(f"right {accuracy(student, *digits.test):.2%} on test, the teacher {accuracy(teacher, *digits.test):.2%}")


if __name__ == "__main__":
    main()

"""flyweight's losses in a Lightning module: a smaller network learns from a teacher's answers, without labels.

python examples/lightning_module.py (needs: pip install lightning)
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flyweight.face.digits import accuracy, load_digits, trained
from flyweight.recover import losses


def small() -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))


def main(epochs: int = 8) -> None:
    try:
        import lightning
    except ImportError:
        raise SystemExit("this example needs Lightning: pip install lightning") from None
    digits = load_digits()
    teacher = trained(seed=0, digits=digits).requires_grad_(False)

    class Taught(lightning.LightningModule):
        def __init__(self, student: nn.Module) -> None:
            super().__init__()
            self.student, self.teacher = student, teacher

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            (images,) = batch
            self.teacher.eval()  # Lightning puts all parts into train mode
            loss = losses.soft_labels(self.student(images), self.teacher(images), temperature=2.0)
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.student.parameters(), lr=3e-3)

    student = small()
    lessons = DataLoader(TensorDataset(digits.train[0]), batch_size=32, shuffle=True)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Taught(student), lessons)
    print(f"right {accuracy(student, *digits.test):.2%} on test, the teacher {accuracy(teacher, *digits.test):.2%}")


if __name__ == "__main__":
    main()

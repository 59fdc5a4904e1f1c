"""A photograph of one's own, a checkpoint of one's own: nothing is measured again, and words say what happens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynattn import create_model, figures, official, weights
from dynattn.data import Shapes
from dynattn.figures import recorded, run, subjects
from dynattn.figures.subjects import load_subject, own_picture, squeezed

CONDITIONS = Path(__file__).parents[1] / "figures" / "conditions.json"


def test_what_is_recorded_is_of_the_shipped_checkpoints(tmp_path, monkeypatch):
    """If this fails: make figures, then dynattn.figures.recorded.record("figures/conditions.json")."""
    kept = recorded.FILE.read_text("utf-8")
    assert {"dat_mini", "dgt_mini", "swin_mini", "sgformer_mini"} <= set(recorded.names()) <= set(weights.shipped())
    assert all(recorded.measured(name) is not None for name in recorded.names())
    monkeypatch.setattr(recorded, "FILE", tmp_path / "recorded.json")
    recorded.record(CONDITIONS)
    assert recorded.FILE.read_text("utf-8") == kept


def test_nothing_is_recorded_of_another_checkpoint(tmp_path, monkeypatch):
    other = tmp_path / "dat_mini.safetensors"
    other.write_bytes(b"trained again")
    monkeypatch.setattr(weights, "path", lambda name: other)
    assert recorded.measured("dat_mini") is None


@pytest.mark.parametrize("paper, number", [("dat", 6), ("dgt", 3)])
def test_a_photograph_needs_no_test_set(paper, number, tmp_path, monkeypatch, capsys):
    """The layer is the recorded one; that it was chosen on test images, and the squeezing, stand in the caption."""
    monkeypatch.setattr(run, "cached", lambda *_, **__: pytest.fail("the test set was made"))
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    (entry,) = figures.draw(paper, [number], image=photograph, out=tmp_path, progress=False)
    said = "The model sees the whole photograph at 128 × 128, its width squeezed by 1.50"
    assert said in entry["caption"] and said in capsys.readouterr().out
    assert "on test images" in entry["caption"] or "test images set apart" in entry["caption"]
    assert "no mask" in entry["caption"]


@pytest.mark.parametrize(
    "size, said",
    [
        ((128, 128), ""),
        ((300, 300), ""),
        ((450, 300), "its width squeezed by 1.50"),
        ((300, 600), "its height squeezed by 2.00"),
    ],
)
def test_a_photograph_of_another_shape_is_squeezed_in_words(size, said):
    picture = own_picture(Image.new("RGB", size, "red"), (128, 128))
    assert squeezed(picture).endswith(said) and bool(squeezed(picture)) == bool(said)


def test_statistics_of_random_networks_are_of_the_same_images(monkeypatch):
    """With and without a photograph."""
    shapes = Shapes("easy", "test", 128, subjects.TEST_COUNT)
    first = np.stack([shapes[i][0].numpy() for i in range(2)])
    monkeypatch.setattr(run, "FEW", 2)
    subject = load_subject(name="dat_mini")
    setting = run.Setting(figures.FIGURES["dat"], subject, Image.new("RGB", (128, 128)))
    assert np.array_equal(setting.few, first)


@pytest.fixture
def saved(tmp_path) -> Path:
    """What a student saves."""
    torch.manual_seed(1)
    torch.save(create_model("dat_mini", num_classes=7).state_dict(), tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def test_a_plain_state_dict_of_our_own_is_read_with_its_name(saved):
    subject = load_subject(saved, "dat_mini")
    state = torch.load(saved)
    assert (subject.name, subject.arguments["num_classes"]) == ("dat_mini", 7)
    own = subject.model.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


def test_without_a_name_it_is_refused_with_advice(saved):
    with pytest.raises(ValueError, match=r"(?s)^weights \(--weights\): none of the published.*--model NAME"):
        load_subject(saved)
    with pytest.raises(ValueError, match=r"^weights \(--weights\): .* entries do not fit the model"):
        load_subject(saved, "dgt_mini")
    with pytest.raises(ValueError, match="name=.*--model NAME"):
        official.model_from(saved)


def test_messages_name_what_the_user_typed(tmp_path):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    for file in (broken, tmp_path / "nowhere.pth", tmp_path / "nowhere.safetensors"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"^weights \(--weights\): "):
            load_subject(file)

"""What leaves a run on an emulator fits the full model, and is what was judged."""

import pytest
import torch

from sheepfold.answering.model import open_source
from sheepfold.answering.source import find
from sheepfold.assembly import assemble
from sheepfold.config import load
from sheepfold.export import export
from sheepfold.offsite.plug import plug
from tests import small
from tests.offsite.bases import CUT, lines_of

IDS = torch.arange(5, 37)[None]


def plain_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_the_full_models_loss_is_the_plugged_models_on_the_same_rows(lora, closed):
    from peft import PeftModel

    experiment = load(lora.folder / "experiment.yaml")
    parts = assemble(experiment, emulator=lambda: lora.folder / "offsite" / "emulator")
    model, total, count = PeftModel.from_pretrained(plain_model(closed), lora.folder / "adapter").eval(), 0.0, 0
    with torch.no_grad():
        for client in parts.data.clients.values():
            for n in client.eval:
                ids, labels = parts.data.tokens.row(int(n))
                losses = torch.nn.functional.cross_entropy(
                    model(ids[None]).logits[0, :-1], labels[1:], ignore_index=-100, reduction="none"
                )
                total, count = total + float(losses.sum()), count + int((labels[1:] != -100).sum())
    assert lines_of(lora)[-1]["held_out_full"]["loss"]["weighted"] == pytest.approx(total / count, abs=1e-5)


def test_what_leaves_a_lora_run_fits_the_full_model(lora, closed, tmp_path):
    from peft import PeftModel

    expected = small.logits_with(plain_model(closed), plug(lora.adapter, CUT), IDS)
    source = find(lora.folder)
    assert source.adapter("federated").hash() == plug(lora.adapter, CUT).hash()
    assert {int(name.split(".")[2]) for name in source.adapter("best").pairs} == {0, 1, 6, 7}
    export(lora.folder, tmp_path / "peft")
    export(lora.folder, tmp_path / "merged", to="merged")
    for folder in (lora.folder / "adapter", tmp_path / "peft"):
        model = PeftModel.from_pretrained(plain_model(closed), folder)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(plain_model(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)
    with open_source(source, "cpu") as answering, answering.using(["federated"]) as model:
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    card = (lora.folder / "model_card.md").read_text()
    assert "Held-out loss of the full model" in card
    assert "clients had an emulator, drop ratio 0.5" in card


def test_what_leaves_a_run_of_whole_layers_is_the_full_model(whole, closed):
    full, made = plain_model(closed), plain_model(whole.folder / "adapter")
    plugged = plug(whole.adapter, CUT).extra
    for name, tensor in made.named_parameters():
        expected = plugged.get(name, full.get_parameter(name))
        assert torch.equal(tensor, expected), name
    assert not torch.equal(logits(made), logits(full))
    with open_source(find(whole.folder), "cpu") as answering, answering.using(["federated"]) as model:
        assert torch.equal(logits(model), logits(made))

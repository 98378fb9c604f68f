"""The model card: what stands on it, what of a README.md is kept, and that no number stays that is no longer true."""

import json
import re

import pytest
import yaml
from peft import PeftModel, get_peft_model
from short_runs import run
from transformers import AutoModelForCausalLM

from peft_pcgrow import PCGrowConfig, measure_errors
from peft_pcgrow.adapter.model_card import BEGIN, END, adapters_in, make_card
from peft_pcgrow.hub.contents import find_grown
from peft_pcgrow.rounds.journal import read_journal
from peft_pcgrow.rounds.run_card import measured_by
from tiny import LOCUS, build, dense, domain, retain, spawning, train


@pytest.fixture
def base(tmp_path):
    """Folder of a base with a card that says its licence."""
    build().save_pretrained(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A base\n")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def data(text: str) -> dict:
    """The metadata at the top of a card."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_what_save_pretrained_writes(base, tmp_path):
    get_peft_model(base, PCGrowConfig(locus=LOCUS)).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert data(card) == {
        "base_model": base.config._name_or_path,
        "library_name": "peft",
        "license": "cc-by-4.0",
        "pipeline_tag": "text-generation",
        "tags": ["peft", "peft_pcgrow", "transformers"],
    }
    assert "More Information Needed" not in card
    assert "import peft_pcgrow" in card
    assert "| 2 | 0, 3, 7 | - |" in card
    assert "Not noted with these files" in card
    assert "merge_and_unload" in card
    # a path, which PEFT notes, would say more of the machine than of the model
    assert str(tmp_path) not in card.split("---", 2)[2]


def test_newborns_are_not_merged(base, tmp_path):
    model = get_peft_model(base, spawning())
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert "export_flat" in card
    assert "merge_and_unload" not in card
    assert "| 2 | - | 0, 3, 7 |" in card


def test_newborns_beside_mlps_have_no_plain_checkpoint(tmp_path):
    """No router chooses an MLP, so none has a row for its newborn: neither the card nor an error says otherwise."""
    emap = measure_errors(dense(), [domain(64)], retain=[retain(64)], window=8, progress=False)
    model = get_peft_model(dense(), spawning(error_map=emap, locus={1: [0]}))
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert "they do not merge: a runtime must import peft_pcgrow." in card
    assert "export_flat" not in card
    with pytest.raises(ValueError, match=r"has newborns \(layer 1: \[0\]\).*Keep the adapter$"):
        model.merge_adapter()


def test_the_lines_of_a_card_load_what_they_say(base, tmp_path):
    """Several adapters, none of which a run made: run as they stand there, with the folder for its name."""
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS), adapter_name="law")
    model.add_adapter("medicine", PCGrowConfig(locus={0: [5]}))
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    lines = lines.replace("this adapter", str(tmp_path / "adapter")).replace("its base", str(tmp_path / "base"))
    found = {}
    exec(lines, found)
    assert list(found["model"].peft_config) == ["law", "medicine"]


def test_a_base_of_the_hub(tmp_path):
    """Its name, its revision, and how both load; without a licence there is a line that asks for it."""
    get_peft_model(build(), PCGrowConfig(locus=LOCUS, revision="v2")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "them/base"}))
    card = make_card(tmp_path, repo="me/grown")
    assert data(card)["base_model"] == "them/base"
    assert "base_model:adapter:them/base" in data(card)["tags"]
    assert "[them/base](https://huggingface.co/them/base), revision v2" in card
    assert 'from_pretrained("me/grown")' in card
    assert "Fill in `license:`" in card


def test_what_was_written_by_hand_stays(base, tmp_path):
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/README.md"
    top, own = path.read_text().split("---\n", 2)[1:]
    path.write_text(
        f"---\n{top}license: mit\nlanguage: de\n---\n\nBefore.\n{own.strip()}\n\nAfter.\n".replace(
            "license: cc-by-4.0\n", ""
        )
    )
    model.save_pretrained(tmp_path / "adapter")
    card = path.read_text()
    assert (data(card)["license"], data(card)["language"]) == ("mit", "de")
    assert card.index("Before.") < card.index(BEGIN) < card.index(END) < card.index("After.")
    assert card.count(BEGIN) == card.count("### Framework versions") == 1
    model.save_pretrained(tmp_path / "adapter")
    assert path.read_text() == card


def test_a_card_of_ones_own_is_added_to(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/README.md").write_text("---\nlanguage: de\n---\n\n# Mine\n\nText.\n")
    get_peft_model(base, PCGrowConfig(locus=LOCUS)).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert "# Mine\n\nText." in card
    assert (card.count(BEGIN), data(card)["language"]) == (1, "de")


def test_a_card_of_something_else_is_left_alone(base, tmp_path):
    """A README.md above the folder, where PEFT has written none."""
    (tmp_path / "README.md").write_text("# A project\n")
    get_peft_model(base, PCGrowConfig(locus=LOCUS)).peft_config["default"].save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "README.md").read_text() == "# A project\n"
    assert not (tmp_path / "adapter/README.md").exists()


# ---- numbers


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    return folder, run(folder, max_steps=4)


def test_numbers_of_a_run_go_where_its_adapters_go(ran, tmp_path):
    """And stay away from any other: trained on, or with one more beside them."""
    folder, result = ran
    number = f"gain {result.gain:.4f} |"
    assert number in (folder / "adapter/README.md").read_text()
    result.model.save_pretrained(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/README.md").read_text() == (folder / "adapter/README.md").read_text()
    loaded = PeftModel.from_pretrained(build(), folder / "adapter", is_trainable=True)
    loaded.peft_config["default"].run = result.model.peft_config["default"].run
    loaded.save_pretrained(tmp_path / "loaded")
    assert number in (tmp_path / "loaded/README.md").read_text()
    loaded.add_adapter("other", PCGrowConfig(locus={0: [7]}))
    loaded.save_pretrained(tmp_path / "more")
    assert number not in (tmp_path / "more/README.md").read_text()
    loaded.delete_adapter("other")
    loaded.base_model.set_adapter("default")
    train(loaded, 1)
    loaded.save_pretrained(tmp_path / "trained")
    card = (tmp_path / "trained/README.md").read_text()
    assert number not in card
    assert "Not noted with these files" in card


def test_no_control_and_no_forgetting_is_made_up(ran, tmp_path):
    folder, result = ran
    card = find_grown(folder).measured
    assert "No control" in card
    assert f"forgetting {result.forgetting:+.4f}" in card
    told = json.loads((folder / "journal.json").read_text())
    told["before"].pop("retain")
    told["rounds"][0]["retain"] = None
    (tmp_path / "journal.json").write_text(json.dumps(told))
    alone = measured_by(read_journal(tmp_path)).text
    assert "forgetting " not in alone
    assert "what was forgotten is not known" in alone


def test_a_run_without_anything_kept_has_no_card(ran, tmp_path):
    journal = json.loads((ran[0] / "journal.json").read_text())
    journal["rounds"][0]["kept"] = False
    (tmp_path / "journal.json").write_text(json.dumps(journal))
    with pytest.raises(ValueError, match="has kept nothing"):
        find_grown(tmp_path)


def test_adapters_below_are_found_in_order(tmp_path):
    for name in ("round-10", "round-2", "law", "."):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    assert list(adapters_in(tmp_path)) == ["default", "law", "round-2", "round-10"]

from recollect.evaluation.appearance import COLOURS, MIXERS, mixer_colours, mixer_of


def config(*mixers):
    return {"model": {"stages": [{"class": "Stage", "pattern": list(mixers)}]}}


def test_a_config_is_named_by_what_mixes_its_tokens():
    short = {"class": "BaseConvolution", "kernel": 3}
    assert mixer_of(config(short, {"class": "Attention"})) == "Attention"
    assert mixer_of(config(short)) == "BaseConvolution"
    assert (
        mixer_of(config({"class": "LinearAttention"}, {"class": "SlidingWindow"})) == "LinearAttention + SlidingWindow"
    )
    assert mixer_of({}) == mixer_of({"model": {"class": "LanguageModel"}}) == ""


def test_a_mixer_keeps_its_colour_whatever_is_beside_it():
    alone = mixer_colours(["Attention"])["Attention"]
    assert mixer_colours(["Mine", "Hyena", "Attention"])["Attention"] == alone == MIXERS["Attention"]
    assert mixer_colours(["Mine"]) == mixer_colours(["Mine"])


def test_colours_shown_together_are_distinct():
    names = [*MIXERS, *(f"Mine{index}" for index in range(len(COLOURS) - len(MIXERS)))]
    assert len(set(mixer_colours(names).values())) == len(COLOURS) == len(set(COLOURS))
    assert len(mixer_colours([*names, "OneMore"])) == len(names) + 1

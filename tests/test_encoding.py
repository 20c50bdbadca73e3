"""Names of epsilons, and numbers that JSON does not have."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from raymem.encoding import epsilon_name, from_json, to_json
from raymem.store import Target, TrialKey

epsilons = st.floats(1e-6, 1e6) | st.just(math.inf)
numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(epsilons, epsilons)
def test_targets_tell_epsilons_apart_as_their_names_do(a, b):
    one, two = (Target(trials=1, epsilons=(epsilon,)).epsilons[0] for epsilon in (a, b))
    assert (epsilon_name(a) == epsilon_name(b)) == (one == two)
    assert TrialKey.parse(TrialKey(one, 3).object_key) == TrialKey(one, 3)
    assert TrialKey(one, 3).name == f"eps-{epsilon_name(a)}-000003"


@given(st.recursive(numbers, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_everything_is_json_and_numbers_come_back(value):
    text = json.dumps(to_json(value), allow_nan=False)
    if isinstance(value, float):
        back = from_json(float, json.loads(text))
        assert back == value or (math.isnan(back) and math.isnan(value))
    elif isinstance(value, dict):
        assert set(json.loads(text)) == set(value)

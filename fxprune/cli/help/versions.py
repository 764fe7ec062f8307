"""Versions

Semantic versions: MAJOR.MINOR.PATCH. Public is what `fxprune.__all__` names, the commands with their options and
exit codes, and the formats of plan.json and report.json. Everything else may change in any release; the modules
that `fxprune help plugins` imports change only with a line in the changelog.

Before 1.0 a MINOR release may break what is public, after a deprecation; a PATCH never does. From 1.0 on only a MAJOR
release may.

Deprecation: what is going to go keeps working for at least one MINOR release, says so when it is used (a
FxpruneDeprecation, which Python shows by default), names what to use instead and the release that removes it, and
stands in the changelog. A test fails once a release carries something whose time is over.

Formats: plan.json and report.json carry a version of their own. A newer fxprune reads older plans, or says which
release made the last that it can read; an unknown version is an error, never a guess. model.pt2 is torch's own
format.

Same inputs, same seed, same versions: the same plan. Another torch may round differently and choose another neuron.
"""

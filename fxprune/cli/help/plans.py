"""Plans

plan.json is the decision: for every group that is cut, which elements stay; how many tokens go where; which tiles
stay. It is made to be read, diffed and edited, and fits every checkpoint of the same architecture.

  fxprune plan model.pt --flops 0.5 --data data.npz --out plan.json
  fxprune apply model.pt --plan plan.json --out small

One group per line:

  "blocks.0.mlp.fc1:ffn": {"kind": "ffn", "size": 96, "keep": [0, 3, 4, 9]}

Edit "keep": sorted, unique, below "size". A group that is not named keeps everything. What is wrong is said with the
line: a group that the model does not have (with the nearest name), a kind or size that is another, an index out of
range or twice, a key twice, a group that is frozen, a whole branch gone. Counts need not be multiples of 8 (a note
says which are not); --align 8 insists.

>>> from fxprune import CompressionPlan
>>> text = '''{"fxprune_plan": 1, "groups": {
...   "0:ffn": {"kind": "ffn", "size": 4, "keep": [0, 7]}
... }}'''
>>> CompressionPlan.from_json(text, "plan.json")
Traceback (most recent call last):
fxprune.errors.PlanError: a kept index is out of range
  at    plan.json:2: group '0:ffn'
  why   indices must be 0..3, found 0..7

"about" says where a plan comes from; nothing is read from it.

The report of an applied plan has a pipeline that replays it like any other, with the plan given beside its text:
--plan small/plan.json (fxprune help pipelines).
"""

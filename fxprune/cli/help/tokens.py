"""Tokens

Vision transformers spend most of their work on tokens that repeat. `--tokens` merges or drops them behind the
attentions of any ViT-like model; where, the graph says: every token must be treated alike from there on. Windows,
rotary tables and relative position biases are frozen with the reason (`fxprune inspect` lists the sites); heads that
read every token (dense prediction, models that return their tokens) get them back with `--unmerge`.

  fxprune compile vit.pt --target onnx --flops 0.5 --data images/ --tokens 'tome{schedule=auto}'
  fxprune compile vit.pt --target onnx --flops 0.5 --data images/ --prune heads,ffn,tokens

What happens to tokens (--tokens)

    tome             the most similar ones merge, by the mean keys; attention counts a token as often as it stands for
    prune{score=..}  the lowest go, by class-value, class, entropy-value or received-value
    ppt              every image prunes or merges, by how much its scores differ
    zero-tprune      those that others repeat go, then those that the attention graph ranks lowest
    transform        every token that goes gives shares of itself to those that stay
    random           the baseline

How many go where: `tome:r=13` (everywhere), `ppt:r=50@3,6,9` (at these), or as many as `--flops` asks, by
`tome{schedule=..}`: `constant`, `decreasing`, `optin` (rank elimination on measured merge curves, per cost saved),
`removal` (on tokens taken out one by one), or `auto` (the first three are tried on the data, the best is improved).
The last three give way to `constant` where they are not clearly better (`guard=false` lets them be). With `--prune
heads,ffn,tokens` what tokens take of the budget is tried on the data as well. `aware=false` eliminates by score alone,
as the paper does, and `mean_first=true` compares features as its code does.

Counts are constants of the graph and the batch stays open, so ONNX (no custom op, opset 18 to 20) and TensorRT take
the result; an artefact holds a picture of which patches merged (tokens.png). Ties are decided by position on every
runtime. Where two choices are as good as equal, rounding may still decide differently in two runtimes: verification
leaves out samples at which the pruned model itself jumps when its inputs move by 2e-5, and says how many.

Measured on a ViT with 197 tokens trained on CIFAR-10 (64.90 % of 2000 test images; differences below about 0.5 are
noise): accuracy and, in brackets, KL to the dense model on other images, ToMe's reducer alone, no recovery.

    schedule                     0.9            0.8            0.7            0.6            0.5            0.4
    constant           64.80 (.0001)  65.05 (.0006)  65.20 (.0019)  64.70 (.0045)  63.95 (.0136)  63.60 (.0446)
    decreasing         64.80 (.0001)  65.00 (.0007)  65.20 (.0016)  64.75 (.0044)  64.20 (.0100)  63.85 (.0283)
    elimination alone  64.60 (.0002)  64.85 (.0008)  64.80 (.0033)  64.45 (.0050)  64.65 (.0095)  63.70 (.0285)
    optin              64.80 (.0001)  65.05 (.0006)  65.20 (.0019)  64.70 (.0045)  64.65 (.0095)  63.70 (.0285)
    auto (default)     64.90 (.0002)  65.00 (.0005)  65.25 (.0015)  64.40 (.0039)  64.25 (.0093)  63.30 (.0275)

`optin` takes what elimination finds only where that is clearly better than the constant schedule on the calibration
data (two standard errors, paired); from 0.6 up it is not, and curves of single attentions mislead when all of them
merge.

Other reducers with the default schedule: accuracy and KL.

    reducer                       0.9          0.7          0.5          0.4
    random                64.6 (.001)  64.4 (.012)  63.6 (.037)  63.7 (.061)
    ppt                   64.6 (.001)  64.4 (.013)  63.4 (.059)  60.8 (.104)
    zero-tprune           64.6 (.002)  64.5 (.025)  61.7 (.072)  60.2 (.128)
    prune, class-value    64.8 (.003)  63.2 (.045)  60.9 (.146)  58.0 (.227)
    prune, class          64.5 (.003)  62.9 (.048)  60.9 (.151)  58.0 (.234)
    prune, entropy-value  64.7 (.003)  63.3 (.036)  60.8 (.117)  59.5 (.179)
    transform             65.0 (.002)  64.5 (.018)  63.2 (.054)  63.4 (.085)

Held against the constant schedule on 3744 images that neither training nor a method saw (the test images and 1744
held-out ones; `random`: the mean of five draws), over eight reducers and six ratios: `optin` is where it is in 21 of 48
cells, above it in 18 and below it in 9, by +0.62 points in the mean of those that differ; below by more than a standard
error in none. `auto` (one draw): 7, 26 and 15, by +0.45 points; below by more than a standard error at `random` 0.7
alone. In the mean over the reducers, points beside the constant schedule:

    over reducers     0.9    0.8    0.7    0.6    0.5    0.4
    optin           +0.02  +0.02  +0.01  +0.06  +0.04  +1.95
    auto            +0.05  -0.01  -0.04  +0.13  +0.08  +2.20

Standard errors are 0.05 to 0.25: down to 0.5 what a better schedule wins is closeness, not accuracy. By KL `optin` is
nearer to dense than the constant schedule wherever they differ.

On this model (small pictures, enlarged: neighbouring tokens say much the same) merging is far ahead, and dropping
tokens at random beats every score of `prune` from 0.5 down, and by KL throughout: scores take whole regions away. Do
not read a ranking of these methods on other models into it.

With recovery at 0.5: weights alone 63.25 (.0256), tokens alone 64.75 (.0073), both on one ledger 65.25 (.0011); on the
1744 held-out images 64.51, 65.60 and 65.19. Over all images both are above tokens alone by 0.08 points, standard error
0.27: as good in accuracy, much nearer to dense. Without recovery: 62.45 (.0646), 64.25 (.0093) and 64.80 (.0031), so it
helps on merged tokens too.

Times faster than dense in onnxruntime, batch 32, one CPU thread, interleaved, constant schedule; in brackets, as a
share of what the MACs promise. The decreasing schedule and `optin` are in the JSON.

    faster, batch 32               0.9          0.8          0.7          0.6          0.5          0.4
    tome                   1.15 (1.03)  1.24 (0.99)  1.40 (0.98)  1.75 (1.05)  2.03 (1.01)  2.66 (1.06)
    random                 1.30 (1.17)  1.52 (1.21)  1.70 (1.19)  1.98 (1.19)  2.41 (1.21)  3.03 (1.21)
    ppt                    1.00 (0.90)  1.14 (0.91)  1.33 (0.93)  1.61 (0.97)  1.93 (0.96)  2.49 (0.99)
    zero-tprune            1.09 (0.98)  1.24 (0.99)  1.43 (1.00)  1.64 (0.99)  2.06 (1.03)  2.48 (0.99)
    prune, class-value     1.18 (1.06)  1.36 (1.09)  1.62 (1.13)  1.83 (1.10)  2.24 (1.12)  2.74 (1.10)
    prune, class           1.24 (1.12)  1.37 (1.10)  1.61 (1.13)  1.85 (1.11)  2.21 (1.10)  2.79 (1.11)
    prune, entropy-value   0.97 (0.87)  1.11 (0.89)  1.30 (0.91)  1.52 (0.91)  1.81 (0.91)  2.26 (0.90)
    transform              1.01 (0.91)  1.14 (0.91)  1.42 (0.99)  1.67 (1.00)  2.00 (1.00)  2.55 (1.02)

At batch 1 the ops weigh more: ToMe reaches 0.65 to 0.89 of the promise, `ppt` as little as 0.55. All 147 cells at
batch 32 reach 0.85; the least is 0.87. zero-tprune iterates 5 times where its paper does 30: with those it had 0.80 at
0.9, and accuracy 0.5 points above to 1.3 below these.

Rerun, in a checkout: python tools/bench/tokens.py
"""

"""What both kinds of training share: set-up, checkpoints, callbacks, full memory.

It knows the trainers of Transformers and TRL from outside. It does not know evaluation or commands.
It imports `judging` and the packages before it; `jsft` and `self_training` stand inside it.
"""

"""What both kinds of training share: set-up, checkpoints, callbacks, full memory.

It knows the trainers of Transformers and TRL. It does not know evaluation or commands. It imports
from `judging` and the packages before it, and contains `jsft` and `self_training`.
"""

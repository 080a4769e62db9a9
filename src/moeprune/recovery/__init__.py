"""What stays is fitted to stand in for what goes: closed form, no training, layer after layer."""

from moeprune.recovery.checkpoints import recover_checkpoint
from moeprune.recovery.recover import Recovered, recover

__all__ = ["Recovered", "recover", "recover_checkpoint"]

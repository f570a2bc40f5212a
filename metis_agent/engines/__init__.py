"""Plug-ins for training engines other than our own, so that their users get HDPO's rewards and advantages."""

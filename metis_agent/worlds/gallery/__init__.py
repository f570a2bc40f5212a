"""The gallery: signs, labels and charts to read, some at a glance and some only once they are cropped and enlarged.

Every picture is drawn here from a seed, so no image file is needed; the policy is a tiny Qwen3-VL, trained here too.
"""

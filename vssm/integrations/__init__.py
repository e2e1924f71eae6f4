"""Plug-ins for other frameworks; nothing in vssm imports them, and none of the frameworks is needed by vssm."""

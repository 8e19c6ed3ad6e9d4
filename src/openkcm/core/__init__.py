# SPDX-License-Identifier: Apache-2.0
"""The Core: the vault of tenant and service keys."""

from .audit import AuditRecord
from .core import Core
from .liveness import Probe
from .status import ServiceKeyStatus, ServiceStatus, TenantStatus

__all__ = ["AuditRecord", "Core", "Probe", "ServiceKeyStatus", "ServiceStatus", "TenantStatus"]

# SPDX-License-Identifier: Apache-2.0
"""The Core: the vault of tenant and service keys."""

from .audit import AuditRecord
from .core import Core
from .grants import Grant, Grants, RevokedCertificate
from .liveness import Probe
from .status import ServiceKeyStatus, ServiceStatus, TenantStatus

__all__ = [
    "AuditRecord",
    "Core",
    "Grant",
    "Grants",
    "Probe",
    "RevokedCertificate",
    "ServiceKeyStatus",
    "ServiceStatus",
    "TenantStatus",
]

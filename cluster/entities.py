"""Names of personal data and secrets, as definitions use them."""

from __future__ import annotations

from typing import Literal, get_args

Entity = Literal["EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "NATIONAL_ID", "API_KEY"]
Region = Literal["AU", "CA", "DE", "ES", "FI", "FR", "GB", "IN", "IT", "KR", "PL", "SE", "SG", "TH", "TR", "US"]
"""Countries whose national ids, and whose phone numbers without a country code, can be looked for."""

ENTITIES: tuple[Entity, ...] = get_args(Entity)
REGIONS: tuple[Region, ...] = ("US", "GB", "DE", "FR", "ES", "IT")
"""Looked for where nobody says otherwise."""

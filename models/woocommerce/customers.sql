-- WooCommerce: one row per customer of the orders, with name and city of the last order.
--
-- The key is the hash of the billing e-mail address, or without one that of the account; see transactions.sql.
--
-- source orders: orders*, woocommerce_orders*, woocommerce-orders*
-- columns orders: order_id, date, order_date, customer_id, billing_first_name, billing_last_name, billing_email
-- columns orders: billing_city

WITH known AS (
    SELECT *,
        CASE
            WHEN trim(billing_email) <> '' THEN xxhash64(lower(trim(billing_email)))
            WHEN trim(customer_id) NOT IN ('', '0') THEN xxhash64(trim(customer_id))
        END AS customer
    FROM orders
)
SELECT DISTINCT
    customer AS customer_id,
    nullif(trim(billing_first_name), '') AS first_name,
    nullif(trim(billing_last_name), '') AS last_name,
    nullif(trim(billing_email), '') AS email,
    nullif(trim(billing_city), '') AS city,
    _delivery, _source_file, _source_row
FROM (
    SELECT *,
        ROW_NUMBER() OVER (
            PARTITION BY customer ORDER BY coalesce(`date`, order_date) DESC, _delivery DESC, _source_row DESC
        ) AS recency
    FROM known
    WHERE customer IS NOT NULL
)
WHERE recency = 1
